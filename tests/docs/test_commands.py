"""Every block of commands in the README and the docs works as printed. It is run, with small sizes, on files with the
names that its page uses. If a tag says why it cannot run here, it is checked without starting anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.cli.main import COMMANDS
from megatron_ettin.cli.parsing import options_of
from megatron_ettin.config.schema import key_types
from tests.cli.test_examples import parser_of
from tests.docs.pages import Block, all_blocks, blocks_of, pages
from tests.docs.shell import EXACT, Shell

SHELLS = ("bash", "console", "sh")
BLOCKS = [block for block in all_blocks() if block.language in SHELLS]
BY_PAGE = {page: [block for block in BLOCKS if block.page == page] for page in dict.fromkeys(b.page for b in BLOCKS)}
# these pages cover runs, a dataset, an export, ranks of torchrun and checked jobs; the others are marked `full`
FIRST_TIER = ("README.md", "docs/prepare.md", "docs/convert.md", "docs/layouts.md", "docs/slurm.md")
INLINE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
GROUPS = ("model", "parallel", "precision", "optim", "schedule", "data", "batch")
GROUPS += ("checkpoint", "metrics", "resilience", "profile")  # not `run`, which is also the name of functions
KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(GROUPS)})\.[a-z]\w*)(?![\w.(/])")
FILES = (".jsonl", ".py", ".md")
# keys of the original trainer's YAML, and a deliberate typo
NO_KEYS = {"model.model_config", "model.name", "optim.lrr"}


@pytest.mark.parametrize(
    "page", [page if page in FIRST_TIER else pytest.param(page, marks=pytest.mark.full) for page in BY_PAGE]
)
def test_docs_page_command_blocks_exit_0(page: str, shell: Shell, tmp_path: Path) -> None:
    """Run the page's blocks in order, in one folder."""
    folder = shell.sandbox(tmp_path / "here", page)
    for block in BY_PAGE[page]:
        if block.tag == "never":
            continue
        done = shell.run(block, folder)
        message = f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{block} ends with {done.returncode}:\n{block.text}\n{message}"
        if page in EXACT:
            assert not worse_than_guessing(done.stdout)


def worse_than_guessing(text: str) -> list[str]:
    """Return the lines of `ettin eval` with a loss that is not below the unigram loss of the line after."""
    pairs = re.findall(r"^(.*loss ([0-9.]+) .*)\n.*unigram loss .*: ([0-9.]+)", text, re.M)
    return [line for line, loss, unigram in pairs if float(loss) >= float(unigram)]


def test_tutorial_torchrun_names_the_threads_of_a_rank() -> None:
    """Without OMP_NUM_THREADS torchrun prints a long notice, which would be the first thing a newcomer sees."""
    calls = [line for block in BY_PAGE["docs/tutorial.md"] for line in block.text.splitlines() if "torchrun" in line]
    assert calls
    assert [line for line in calls if not line.startswith("OMP_NUM_THREADS=1 torchrun ")] == []


def test_worse_than_guessing_finds_loss_above_unigram() -> None:
    message = (
        "runs/a: loss {} accuracy 0.1 (286 predicted tokens in 8 rows)\nunigram loss of corpus on the same: 6.1320\n"
    )
    assert worse_than_guessing(message.format(6.189)) == [message.format(6.189).splitlines()[0]]
    assert worse_than_guessing(message.format(5.876)) == []


def test_docs_blocks_at_least_20_untagged_and_at_most_8_never_run() -> None:
    """Tags are for blocks that cannot run here; each gives its reason (pages.py)."""
    assert sum(not block.tag for block in BLOCKS) >= 20
    assert sum(block.tag == "never" for block in BLOCKS) <= 8


def options_and_keys(text: str) -> list[str]:
    """Return the options of the calls of ettin in `text` that do not exist."""
    wrong = []
    for call in re.split(r"\n(?! )|\||&&|;", re.sub(r"\\\n", " ", text)):
        match = re.search(r"\bettin ([a-z]+)\b(.*)", call, re.S)
        if match and match[1] in COMMANDS:
            known = [*options_of(parser_of(match[1])), "--help"]
            known += options_of(parser_of("train")) if match[1] == "launch" else []
            wrong += [f"ettin {match[1]} {option}" for option in OPTION.findall(match[2]) if option not in known]
    return wrong


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_docs_page_named_options_and_keys_exist(path: Path) -> None:
    """Check the options and keys in the running text, tables and synopses."""
    text = path.read_text()
    fences = [block for block in blocks_of(text, path.name) if block.language not in ("python", "yaml")]
    spans = INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.S))
    named = {key for span in spans for key in KEY.findall(span)}
    named |= {key for block in fences for key in KEY.findall(block.text)}
    assert not [key for key in sorted(named - {*key_types()} - NO_KEYS) if not key.endswith(FILES)]
    assert not [wrong for text in [*spans, *(block.text for block in fences)] for wrong in options_and_keys(text)]


# (block that must fail, a part of its message)
WRONG = [
    ("ettin plan --size 1b --gpus 8 --no-such", "--no-such"),
    ("ettin train --size 17m --objective mlm --phase pretrain --dry-run optim.rate=1", "optim.rate"),
    ("ettin inspect nowhere | cat", "nowhere"),
    ("ettin inspect data --deep", "--deep"),
    ("false", ""),
]
WRONG_IN_TAGGED = [
    ("ettin launch --nodes 1 --gpus-per-node 8 --no-such --submit -- train --size 1b", "--no-such"),
    (
        "ettin launch --nodes 1 --gpus-per-node 8 --cpus-per-task 12 -- train --size 1b --objective mlm --phase pretrain a.b=1",
        "a.b",
    ),
    ("ettin release runs/a --out b --push c/d --invented", "--invented"),
    (
        "torchrun --nproc-per-node 8 --no-python ettin train --size 1b --objective mlm --phase pretrain parallel.tp=3",
        "tp",
    ),
    ("torchrun --ranks 8 --no-python ettin train", "--ranks"),
    ("ettin bench --size 1b parallel.degree=2", "parallel.degree"),
    ("python tools/gpu_validate.py --all", "--all"),
    ("pip install 'megatron_ettin[everything]'", "everything"),
    ("docker build --target none .", "none"),
]


def few_first(cases: list[tuple[str, str]], count: int) -> list[Any]:
    """Return the cases as parameters, all but the first `count` marked `full`."""
    return [*cases[:count], *(pytest.param(*case, marks=pytest.mark.full) for case in cases[count:])]


@pytest.mark.parametrize(("text", "message"), [*few_first(WRONG, 3), *few_first(WRONG_IN_TAGGED, 2)])
def test_docs_shell_wrong_block_exits_nonzero_naming_mistake(
    text: str, message: str, shell: Shell, tmp_path: Path
) -> None:
    tag = "gpu" if (text, message) in WRONG_IN_TAGGED else ""
    done = shell.run(
        Block("page", 1, "bash", text, tag, "a test of the test"), shell.sandbox(tmp_path / "here", "none")
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_blocks_of_wrong_or_unexplained_tag_are_refused() -> None:
    text = "<!-- run: gpu, because eight devices -->\n```bash\nettin train\n```\n"
    (block,) = blocks_of(text, "page")
    assert (block.tag, block.reason, block.text) == ("gpu", "eight devices", "ettin train\n")
    for wrong in ("<!-- run: gpu -->", "<!-- run: tpu, because eight devices -->", "<!-- run: gpu, because no -->"):
        with pytest.raises(ValueError, match="no tag with a reason"):
            blocks_of(f"{wrong}\n```bash\nettin train\n```\n", "page")


def test_options_and_keys_invented_option_is_reported() -> None:
    assert options_and_keys("ettin convert to-hf RUN OUT [--no-verify] [--quietly]") == ["ettin convert --quietly"]
    assert not options_and_keys("ettin order RUN --steps 1:2 | head --lines 3")
