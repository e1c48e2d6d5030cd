"""Hugging Face folders of tiny random models, made by transformers itself, far from their initial values.

Norms, biases and matrices are moved so that a missing norm, a swapped half or a transposed head changes the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TINY = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"local_attention": 16, "max_position_embeddings": 128},
    **{"pad_token_id": 3, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2},
}
SHAPE_17M = {
    **{"vocab_size": 50_368, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 7},
    "num_attention_heads": 4,
}
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 20_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}


def classes(objective: str) -> tuple[Any, Any, Any]:
    """Return transformers' (configuration, model, Auto class) for an objective."""
    import transformers as t

    if objective == "mlm":
        return t.ModernBertConfig, t.ModernBertForMaskedLM, t.AutoModelForMaskedLM
    return t.ModernBertDecoderConfig, t.ModernBertDecoderForCausalLM, t.AutoModelForCausalLM


def make_model(objective: str, shape: dict[str, Any] = TINY, seed: int = 0) -> Any:
    config, model_class, _ = classes(objective)
    torch.manual_seed(seed)
    model = model_class(config(**shape, rope_parameters=ROPE)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.mul_(4)
    return model


def make_folder(path: Path, objective: str, shape: dict[str, Any] = TINY, dtype: torch.dtype = torch.float32) -> Path:
    make_model(objective, shape).to(dtype).save_pretrained(path)
    return path


def load(folder: Path, objective: str, dtype: torch.dtype = torch.float32) -> Any:
    return classes(objective)[2].from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def logits(model: Any, tokens: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, model.config.vocab_size, (2, tokens), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder by name, read by the library safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def command(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Run `ettin convert` and return (exit status, standard output, last line of standard error)."""
    from megatron_ettin.cli.main import main

    capsys.readouterr()
    status = main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, (err.strip().splitlines() or [""])[-1]


def refused(capsys, tmp_path, way, source, message):
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = command(capsys, way, source, tmp_path / "out")
    assert status == 2
    assert out == ""
    assert err.startswith("ettin convert: ")
    assert message in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """Apply `change` to the folder's tensors, write them as one file, and return the path of the former first shard."""
    file = sorted(folder.glob("*.safetensors"))[0]
    held = tensors(folder)
    for other in folder.glob("*.safetensors"):
        other.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return file
