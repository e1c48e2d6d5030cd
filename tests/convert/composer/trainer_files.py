"""Make files like the original trainer's from models of transformers; names and surrounding state are written by
hand."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from tests.convert.folders import TINY, command, make_model

# content of the trainer's FlexBertConfig for the models of tests/convert/folders.py
CONFIG = {
    **{"model_type": "bert", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "attention_layer": "rope", "bert_layer": "prenorm", "embedding_layer": "sans_pos"},
    **{"mlp_layer": "glu", "normalization": "layernorm", "norm_kwargs": {"eps": 1e-5, "bias": False}},
    **{"hidden_act": "gelu", "head_pred_act": "gelu", "rotary_emb_base": 20_000.0, "rotary_emb_dim": 16},
    **{"local_attn_rotary_emb_base": 500.0, "sliding_window": 16, "global_attn_every_n_layers": 3},
    **{"attn_out_dropout_prob": 0.1, "init_std": 0.02, "max_position_embeddings": 512, "padding": "unpadded"},
}
CLASSES = {"mlm": "FlexBertForMaskedLM", "clm": "FlexBertForCausalLM"}


class Metric:
    """Stand in for the classes of Composer and torchmetrics whose objects such a file holds."""

    def __init__(self) -> None:
        self.value = 1.0


def reference(objective: str, shape: dict[str, Any] = TINY) -> Any:
    """Return a model of transformers; a decoder's window has one key more, as in the original trainer."""
    window = shape.get("local_attention", 128) // 2 + 1
    model = make_model(objective, shape if objective == "mlm" else {**shape, "sliding_window": window})
    model.set_attn_implementation("eager")
    return model


def trainer_names(model: Any, objective: str) -> OrderedDict[str, torch.Tensor]:
    """Return the weights under the names of the trainer's FlexBERT models, which fuse q, k and v in both classes."""
    theirs, named = model.state_dict(), OrderedDict()
    for name, tensor in theirs.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([theirs[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace("q_proj", "Wqkv")
        name = name.replace("model.layers.", "bert.encoder.layers.").replace("model.", "bert.")
        named[f"model.{name}"] = tensor
    named["model.decoder.weight"] = named["model.bert.embeddings.tok_embeddings.weight"]
    return named


def composer_state(named: dict[str, torch.Tensor], objective: str, config: dict[str, Any] | None = CONFIG) -> Any:
    """Return the tree that Composer saves around the weights, which contains objects of its classes."""
    integrations: dict[str, Any] = {}
    if config is not None:
        content = config | {"causal_mask": objective == "clm"}
        entry = {"file_extension": ".json", "content": content, "class": f"src.bert_layers.model.{CLASSES[objective]}"}
        integrations["huggingface"] = {"model": {"config": entry}, "tokenizer": {}}
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
    moments = {name: {"step": torch.tensor(7.0), "exp_avg": torch.ones_like(t)} for name, t in tensors.items()}
    times = {"batch": 5_996, "sample": 1_000, "token": 17_000_000_000, "total_wct": datetime.timedelta(hours=3)}
    state = {
        "model": named,
        "optimizers": {"StableAdamW": {"state": moments, "param_groups": [{"lr": 1e-3}]}},
        "timestamp": {"Timestamp": times},
        "callbacks": {"SpeedMonitor": {"total": 1.5}},
        "train_metrics": {"loss": Metric()},
        "run_name": "tiny_no_packing",
        "integrations": integrations,
        "metadata": {"torch_version": torch.torch_version.TorchVersion("2.4.0"), "device": torch.device("cpu")},
    }
    return {"state": state, "rng": [{"python": (3, tuple(range(9)), None), "torch": torch.get_rng_state()}]}


def trainer_file(path: Path, objective: str, shape: dict[str, Any] = TINY, **changes: Any) -> Any:
    """Write a trainer's file and return the transformers model whose weights it holds."""
    model = reference(objective, shape)
    torch.save(composer_state(trainer_names(model, objective), objective, **changes), path)
    return model


def refused(capsys, tmp_path, file, message, *arguments):
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = command(capsys, "from-composer", file, tmp_path / "out", *arguments)
    assert status == 2, err
    assert out == "", err
    assert err.startswith("ettin convert: "), err
    assert message in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
