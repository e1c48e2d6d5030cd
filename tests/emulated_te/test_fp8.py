"""FP8 by Transformer Engine's own Python: recipes, the state that outlives a step, precisions that change, weights that
live in FP8."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.bench import results
from tests.emulated_te.runs import apart, like_weights, same_weights, train
from tests.pool import Pool
from tests.train.runs import Trained, command

pytestmark = pytest.mark.ranks
RECIPES = ["fp8-delayed", "fp8-current", "fp8-blockwise"]
ROUNDING = 2e-3  # of FP8 over eight steps, on another layout too
SHARDED = "parallel.tp=2 parallel.sequence_parallel=true"
OVERLAP = "parallel.overlap=true"


@pytest.fixture(scope="module")
def whole(te_pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """One rank's run in each precision, made when first asked for."""
    made: dict[str, Trained] = {}

    def get(precision: str) -> Trained:
        if precision not in made:
            words = f"precision.name={precision}"
            made[precision] = train(te_pool, 1, tmp_path_factory.mktemp("whole"), corpus, "mlm", words)
        return made[precision]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_follow_bf16(whole, recipe: str) -> None:
    assert 0 < apart(whole(recipe), whole("bf16")) < ROUNDING


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("fp8-delayed", SHARDED),
        ("fp8-current", SHARDED),
        ("fp8-delayed", "parallel.pp=2"),
        ("fp8-blockwise", "parallel.cp=2"),
    ],
)
def test_layouts(te_pool: Pool, corpus: Path, tmp_path: Path, whole, recipe: str, words: str) -> None:
    if recipe == "fp8-blockwise":
        words += " model.num_attention_heads=2"
    found = train(te_pool, 2, tmp_path, corpus, "mlm", f"precision.name={recipe} {words}")
    assert 0 < apart(found, whole(recipe)) < ROUNDING


def test_blocks_are_gathered(te_pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """fp8-blockwise under sequence parallelism, of the narrowest shape whose halves are whole blocks."""
    wide = "model.hidden_size=256 run.steps=4"
    plain = train(te_pool, 1, tmp_path / "plain", corpus, "mlm", wide)
    words = f"{wide} {SHARDED} precision.name=fp8-blockwise precision.fp8_weights=true"
    assert 0 < apart(train(te_pool, 2, tmp_path / "blocks", corpus, "mlm", words), plain) < ROUNDING


def test_blackwell(blackwell_pool: Pool, corpus: Path, tmp_path: Path, whole) -> None:
    """MXFP8, on ranks too and after a stop; and scales per tensor, of which there is one copy there."""
    words = f"precision.name=mxfp8 {SHARDED}"
    for steps in (4, 8):
        found = train(blackwell_pool, 2, tmp_path / "mxfp8", corpus, "mlm", f"{words} run.steps={steps}")
    assert 0 < apart(found, whole("bf16")) < ROUNDING
    alone = train(blackwell_pool, 1, tmp_path / "alone", corpus, "mlm", "precision.name=mxfp8")
    assert 0 < apart(found, alone) < ROUNDING
    other = train(blackwell_pool, 1, tmp_path / "other", corpus, "mlm", "precision.name=fp8-current run.steps=2")
    assert other.column("loss") == whole("fp8-current").column("loss")[:2]


def test_layers_that_stay_in_bf16(te_pool: Pool, corpus: Path, tmp_path: Path, whole) -> None:
    words = "precision.name=fp8-current precision.bf16_first_layers=1 precision.bf16_last_layers=1 parallel.pp=2"
    found = train(te_pool, 2, tmp_path, corpus, "mlm", words)
    assert found.column("loss")[0] not in (whole("fp8-current").column("loss")[0], whole("bf16").column("loss")[0])
    assert apart(found, whole("fp8-current")) < ROUNDING


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_layers_quantize_the_same(te_pool: Pool, corpus: Path, tmp_path: Path, whole, recipe: str) -> None:
    found = train(te_pool, 1, tmp_path, corpus, "mlm", f"precision.name={recipe} parallel.recompute=full")
    assert found.column("loss") == whole(recipe).column("loss")


def evaluated(corpus: Path) -> str:
    return f"precision.name=fp8-delayed data.validation={corpus / 'heldout'} metrics.eval_every_steps=2 metrics.eval_rows=8"


def test_evaluations_leave_no_trace(te_pool: Pool, corpus: Path, tmp_path: Path, whole) -> None:
    """Passes forward quantize too, and delayed scales come from the largest values that were quantized."""
    found = train(te_pool, 1, tmp_path, corpus, "mlm", evaluated(corpus))
    assert found.column("loss") == whole("fp8-delayed").column("loss") and same_weights(found, whole("fp8-delayed"))


def test_delayed_scales_go_on(te_pool: Pool, corpus: Path, tmp_path: Path, whole) -> None:
    """Stopped after an evaluation and resumed: the same bits. On two ranks: as a run that never stopped."""
    for steps in (4, 8):
        found = train(te_pool, 1, tmp_path / "one", corpus, "mlm", f"{evaluated(corpus)} run.steps={steps}")
    assert found.column("loss") == whole("fp8-delayed").column("loss")
    train(te_pool, 1, tmp_path / "two", corpus, "mlm", f"{evaluated(corpus)} run.steps=4")
    found = train(te_pool, 2, tmp_path / "two", corpus, "mlm", f"{evaluated(corpus)} {SHARDED}")
    assert 0 < apart(found, whole("fp8-delayed")) < ROUNDING


def test_precisions_and_layers_change(pool: Pool, te_pool: Pool, corpus: Path, tmp_path: Path, whole) -> None:
    """Local layers, then FP8, then FP8 of another recipe with weights of its own, then local layers in fp32."""
    train(pool, 1, tmp_path, corpus, "mlm", "run.steps=2")
    train(te_pool, 1, tmp_path, corpus, "mlm", "precision.name=fp8-delayed run.steps=4")
    train(te_pool, 2, tmp_path, corpus, "mlm", "precision.name=fp8-current precision.fp8_weights=true run.steps=6")
    found = train(pool, 1, tmp_path, corpus, "mlm", "precision.name=fp32")
    assert 0 < apart(found, whole("bf16")) < ROUNDING


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_in_fp8_change_nothing(te_pool: Pool, corpus: Path, tmp_path: Path, whole, recipe: str) -> None:
    """They are the numbers that a product would have cast its weight to: the same losses, to the bit, and the same
    checkpoint, whose weights are not rounded to FP8."""
    found = train(te_pool, 1, tmp_path, corpus, "mlm", f"precision.name={recipe} precision.fp8_weights=true")
    assert found.column("loss") == whole(recipe).column("loss") and same_weights(found, whole(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_in_fp8_are_gathered(te_pool: Pool, corpus: Path, tmp_path: Path, recipe: str) -> None:
    """On two data-parallel ranks, beside the forward pass, with evaluations and a resume between: as with 16-bit weights
    that are gathered before it."""
    plain = (
        f"precision.name={recipe} data.validation={corpus / 'heldout'} metrics.eval_every_steps=3 metrics.eval_rows=8"
    )
    words = f"{plain} {OVERLAP} precision.fp8_weights=true resilience.check_replicas_every=2"
    for steps in (4, 8):
        found = train(te_pool, 2, tmp_path / "fp8", corpus, "mlm", f"{words} run.steps={steps}")
    expected = train(te_pool, 2, tmp_path / "plain", corpus, "mlm", plain)
    assert found.column("loss")[0] == expected.column("loss")[0] and apart(found, expected) < 1e-4
    assert like_weights(found, expected)


@pytest.mark.parametrize("recipe", ["fp8-delayed", "fp8-current"])
def test_weights_in_fp8_begin_as_those_of_others(
    te_pool: Pool, corpus: Path, tmp_path: Path, whole, recipe: str
) -> None:
    """--init-from: their masters are the checkpoint's weights, not what FP8 left of them."""
    start = ["--init-from", str(whole("bf16").directory)]
    runs = [
        train(te_pool, 2, tmp_path / kept, corpus, "clm", f"precision.name={recipe} {words}", options=start)
        for kept, words in (("fp8", "precision.fp8_weights=true checkpoint.weights_every_tokens=1500"), ("plain", ""))
    ]
    assert runs[0].column("loss")[0] == runs[1].column("loss")[0] and apart(*runs) < 1e-4
    assert like_weights(*runs)
    assert len(list((tmp_path / "fp8" / "milestones").iterdir())) == 2


def test_memory_saved_is_as_planned(te_pool: Pool, tmp_path: Path) -> None:
    """By the tensors of a step at its fullest."""
    shape = ["model.num_layers=2", "model.num_attention_heads=4", "model.vocab_size=2048", "data.seq_len=64"]
    words = [*shape, "run.device=cpu", "precision.name=fp8-current", "--sweep", "precision.fp8_weights=false,true"]
    out = tmp_path / "b.jsonl"
    (done,) = te_pool.run(1, ["bench", "--size", "17m", "--objective", "mlm", "--quick", "--out", str(out), *words])
    assert done.status == 0, done.output[-2000:]
    plain, kept = results.read(out).values()
    saved = [plain[key] - kept[key] for key in ("peak_tensor_bytes", "predicted_memory_bytes")]
    assert saved[0] == saved[1] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("precision.name=bf16", "is of fp8-delayed, fp8-current and fp8-blockwise; precision.name is bf16"),
        (
            "precision.name=fp8-current parallel.distributed_optimizer=false",
            "wants parallel.distributed_optimizer=true",
        ),
        ("precision.name=fp8-current run.cuda_graph=true", "goes not with precision.fp8_weights"),
    ],
)
def test_refusals(te_pool: Pool, corpus: Path, tmp_path: Path, words: str, told: str) -> None:
    line = [*["model.hidden_size=128", "model.ffn_hidden_size=256", "precision.fp8_weights=true"], *words.split()]
    (done,) = te_pool.run(1, command(tmp_path, corpus, "mlm", line))
    assert done.status == 2 and told in done.output
