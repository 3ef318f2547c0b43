"""What a stranger may send is refused in one sentence: nothing runs, nothing is written elsewhere.

`hostile.py`, `hostile_tokens.py` and `hostile_others.py` make the kinds; the sentences stand in hostile_messages.json,
whole, with {in} for the folder that a kind is made in.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae_pipe.pipeline.cli import app
from sae_pipe.storage.evalset_writer import write_evalset

from . import hostile_others
from .hostile import CANARY, KINDS, change
from .test_evalset import ORIGIN, contents, rows

assert hostile_others
ROOT = Path(__file__).resolve().parent.parent
MESSAGES: dict[str, str] = json.loads((ROOT / "tests/hostile_messages.json").read_text())
# Beyond what importing and a good store take: a hundredth of the smallest size that is claimed.
MORE_BYTES = 300 << 20


@pytest.fixture(scope="module")
def good(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What kinds are made from, by the name of their base."""
    folder = tmp_path_factory.mktemp("good")
    write_evalset(folder / "toy.zarr", rows(), contents(), ORIGIN, chunk_rows=10)
    return {"store": store, "evalset": folder / "toy.zarr", "none": folder}


def check(name: str, code: int, stderr: str, inside: Path) -> None:
    """One sentence, the right one, and the canary as it was."""
    said = stderr.rpartition("Error: ")[2].replace(str(inside), "{in}")
    # Addresses, and numbers that depend on the processor that made the good store.
    said = re.sub(r"0x[0-9a-f]+|\d+\.\d{6,}|(?<=it has )\d+(?= bytes instead)", "#", said)
    assert (code, said) == (2, MESSAGES[name] + "\n")
    assert "Traceback" not in stderr
    canary = inside.parent / CANARY
    assert [file.name for file in canary.iterdir()] == ["kept"]
    assert (canary / "kept").read_text() == "kept"


def place_for(folder: Path) -> Path:
    """Where a kind is made, with the canary beside it."""
    (folder / CANARY).mkdir()
    (folder / CANARY / "kept").write_text("kept")
    (folder / "inside").mkdir()
    return folder / "inside"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.is_huge])
def test_it_is_refused_in_one_sentence_and_nothing_runs_or_leaves_its_folder(
    good: dict[str, Path], tmp_path: Path, name: str
) -> None:
    inside = place_for(tmp_path)
    arguments = KINDS[name].make(good[KINDS[name].base], inside)
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    check(name, result.exit_code, result.stderr, inside)


_IN_LITTLE_MEMORY = """
import json, resource, sys, threading
threading.stack_size(1 << 20)
from pathlib import Path
from typer.testing import CliRunner
import sae_pipe.stages.fit, sae_pipe.stages.store_export, sae_pipe.stages.store_import
import sae_pipe.stages.sae_import, sae_pipe.stages.sae_export
from sae_pipe.pipeline.cli import app

jobs, more = json.loads(sys.argv[1]), int(sys.argv[2])
CliRunner().invoke(app, jobs["warm-up"])
here = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (here + more, here + more))
told = {}
for name, arguments in jobs.items():
    result = CliRunner().invoke(app, arguments)
    told[name] = [result.exit_code, result.stderr, repr(result.exception)]
print(json.dumps(told))
"""


def test_a_size_that_is_claimed_is_never_allocated(good: dict[str, Path], tmp_path: Path) -> None:
    """All of them in one process that may take 300 MB more than a good store takes."""
    jobs = {"warm-up": ["store", "verify", str(good["store"])]}
    places = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        if kind.is_huge:
            (tmp_path / str(number)).mkdir()
            places[name] = place_for(tmp_path / str(number))
            jobs[name] = kind.make(good[kind.base], places[name])
    assert len(places) >= 25
    ended = subprocess.run(
        [sys.executable, "-c", _IN_LITTLE_MEMORY, json.dumps(jobs), str(MORE_BYTES)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told.pop("warm-up")[0] == 0
    for name, (code, stderr, exception) in told.items():
        assert exception.startswith("SystemExit"), (name, exception)
        check(name, code, stderr, places[name])


def test_there_are_kinds_enough_and_a_sentence_for_each() -> None:
    assert len(KINDS) >= 100
    assert MESSAGES.keys() == KINDS.keys()


def test_names_from_a_manifest_cannot_move_the_cursor(
    good: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    evil = "\x1b[2J\rgood\x07\u202egnp.exe"
    copy = Path(shutil.copytree(good["store"], tmp_path / "acts.zarr"))
    change(copy, lambda m: m["recipe"]["model"].update(name=evil))
    said = CliRunner().invoke(app, ["store", "info", str(copy)]).stdout
    assert "\\x1b[2J\\rgood\\x07\\u202egnp.exe" in said
    listed = CliRunner().invoke(app, ["store", "ls", str(tmp_path)]).stdout
    assert "\\x1b[2J\\rgood\\x07\\u202egnp.exe" in listed
    change(copy, lambda m: m.update(codec=evil))
    refused = CliRunner().invoke(app, ["store", "verify", str(copy)])
    for text in (said, listed, refused.stdout, refused.stderr.rpartition("Error: ")[2]):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


# --- our own sources ---

# Calls that would let data run, and where one is argued for.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "yaml.load",
    "torch.load", "np.load", "numpy.load", "os.system", "os.popen", "extractall", "extract",
    "import_module", "zarr.open", "zarr.open_array", "zarr.open_group",
}  # fmt: skip
ALLOWED = {
    ("stages/sae_formats/files.py", "torch.load"),  # weights_only, an archive that was looked at
    ("stages/importing/zarr_array.py", "zarr.open_array"),  # after its codecs were looked at
    ("storage/corpus_writer.py", "zarr.open_group"),  # to write
}

# Each takes "module:function" from a dict in its own source, or the name of one library.
REGISTRIES = (
    "stages/compare/formats/__init__.py", "stages/evalsets/__init__.py", "stages/loggers/__init__.py",
    "stages/loggers/tensorboard.py", "stages/loggers/wandb.py", "stages/metrics/__init__.py",
    "stages/sae/__init__.py", "stages/sae_formats/__init__.py", "stages/selftest/__init__.py",
    "stages/toys/__init__.py",
)  # fmt: skip


def _called(node: ast.Call) -> str:
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.insert(0, function.attr)
        function = function.value
    parts.insert(0, function.id if isinstance(function, ast.Name) else "(...)")
    return ".".join(parts)


def test_nothing_in_our_sources_lets_data_run() -> None:
    found = set()
    for file in (
        f for top in ("pipeline", "stages", "storage") for f in (ROOT / top).rglob("*.py")
    ):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert isinstance(node.value, ast.Constant), name
                assert node.value.value is False, name
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(name)
            if not isinstance(node, ast.Call):
                continue
            called = _called(node)
            if called in FORBIDDEN or called.rpartition(".")[2] in ("extractall", "import_module"):
                found.add((name, called.removeprefix("importlib.")))
            if called == "torch.load":
                only = [k.value for k in node.keywords if k.arg == "weights_only"]
                assert [isinstance(v, ast.Constant) and v.value for v in only] == [True]
    assert found <= ALLOWED | {(name, "import_module") for name in REGISTRIES}, found


def test_commands_print_through_the_one_function_that_escapes() -> None:
    """`typer.echo` elsewhere is for JSON, which is ASCII, and the version."""
    for file in (ROOT / "pipeline").glob("*.py"):
        if file.name in ("say.py", "errors.py", "reference.py"):
            continue
        for line in file.read_text().splitlines():
            if "typer.echo" in line or re.search(r"(?<!\w)print\(", line):
                assert "json.dumps" in line or "version(" in line, f"{file.name}: {line}"
