"""Snapshots of code: what is copied, what is linked, what is left out, and when two submissions share one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cfe_hpc.cli.packing import packing, tell_left_out
from cfe_hpc.config.load import Loaded, load
from cfe_hpc.errors import ConfigError
from cfe_hpc.launch.interpreter import import_roots
from cfe_hpc.launch.plan import plan
from cfe_hpc.launch.provenance import WorkTree
from cfe_hpc.launch.secret_files import secret_content, secret_name
from cfe_hpc.launch.snapshot import MARK, SNAPSHOTS, Packed, folder_of, strays, take
from cfe_hpc.launch.submission import preview

KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nabc\n"  # in one word it would be taken for one here, too


@dataclass
class Tree:
    """A git work tree, and a runs root beside it."""

    top: Path
    runs: Path

    def write(self, name: str, text: str = "x\n") -> Path:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def git(self, *words: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(self.top), *who, *words], check=True, stdout=subprocess.DEVNULL)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "code")

    def job(self, *settings: str) -> Loaded:
        return load(str(self.top / "job.toml"), "local", [f"site.storage.runs_root={self.runs}", *settings])

    def take(self, *settings: str) -> Packed:
        packed = take(self.job(*settings), WorkTree(Path.cwd()), self.runs)
        assert packed is not None
        return packed


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path / "tree", tmp_path / "runs")
    tree.write("job.toml", 'name = "j"\ncommand = ["true"]\n')
    tree.write(".gitignore", "data/\n*.log\n")
    tree.git("init", "-q")
    monkeypatch.chdir(tree.top)
    return tree


def test_code_is_copied_and_all_else_is_reached_through_links(tree: Tree) -> None:
    tree.write("pkg/code.py", "old\n")
    tree.write("pkg/gone.py")
    tree.write("pkg/.env", "KEY=1\n")
    tree.write("run.sh").chmod(0o755)
    tree.write("deploy.py", KEY)
    (tree.top / "inside").symlink_to("pkg/code.py")
    (tree.top / "outside").symlink_to("../elsewhere")
    tree.commit()
    tree.write("pkg/code.py", "new\n")
    (tree.top / "pkg" / "gone.py").unlink()
    tree.write("pkg/fresh.py")
    tree.write("pkg/large.bin", "x" * 2_000_000)
    tree.write("data/tokens.bin")
    tree.write("pkg/today.log")
    (tree.top / "out").mkdir()

    packed = tree.take()

    def is_copy(name: str) -> bool:
        path = packed.folder / name
        return path.is_file() and not path.is_symlink()

    assert packed.new and packed.folder.parent == tree.runs / SNAPSHOTS
    assert (packed.folder / "pkg" / "code.py").read_text() == "new\n"
    assert all(map(is_copy, ("pkg/code.py", "pkg/fresh.py", "run.sh", "job.toml", ".gitignore")))
    assert not os.path.lexists(packed.folder / "pkg" / "gone.py") and not os.path.lexists(packed.folder / ".git")
    assert os.access(packed.folder / "run.sh", os.X_OK) and (packed.folder / "run.sh").stat().st_mode & 0o222 == 0
    for name in ("data", "out", "pkg/large.bin", "pkg/today.log", "pkg/.env", "deploy.py"):
        assert os.readlink(packed.folder / name) == str(tree.top / name)
    assert os.readlink(packed.folder / "inside") == "pkg/code.py"
    assert os.readlink(packed.folder / "outside") == str(tree.top.parent / "elsewhere")
    assert sorted(packed.secrets) == ["deploy.py", "pkg/.env"]
    assert json.loads((packed.folder / MARK).read_text())["left_out"] == list(packed.secrets)
    assert [path.name for path in (tree.runs / SNAPSHOTS).iterdir()] == [packed.folder.name]


def test_the_same_code_is_copied_once_and_links_are_kept_up(tree: Tree) -> None:
    tree.write("code.py", "one\n")
    first = tree.take()
    tree.commit()  # what git knows of the code does not change it
    tree.write("data/new.bin")
    second = tree.take()
    assert (second.folder, second.new) == (first.folder, False)
    assert (second.folder / "data" / "new.bin").is_file()
    tree.write("code.py", "two\n")
    assert folder_of(tree.job(), WorkTree(tree.top), tree.runs) != first.folder
    assert tree.take().new
    tree.write("code.py", "one\n")
    assert tree.take().folder == first.folder
    (tree.top / "code.py").chmod(0o755)
    assert tree.take().folder != first.folder


def test_runs_inside_of_the_tree_are_no_code(tree: Tree) -> None:
    tree.runs = tree.top / "runs"
    tree.write("runs/j/j-1/run.toml")
    first = tree.take()
    tree.write("runs/j/j-2/run.toml")
    assert tree.take().folder == first.folder
    assert os.readlink(first.folder / "runs") == str(tree.runs)


def test_what_is_no_work_tree_or_not_wanted_has_none(tree: Tree, tmp_path: Path) -> None:
    assert take(tree.job('snapshot.mode="off"'), WorkTree(tree.top), tree.runs) is None
    assert take(tree.job(), WorkTree(tmp_path), tree.runs) is None
    assert not tree.runs.exists()


def test_a_work_tree_that_git_does_not_list_is_told_of(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree.top / ".git" / "index").write_text("no index\n")
    work_tree = WorkTree(tree.top)
    assert take(tree.job(), work_tree, tree.runs) is None
    tell_left_out(None, work_tree, wanted=True)
    assert "warning: no snapshot of the code, which stays as it is by then: fatal: " in capsys.readouterr().err
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert str(WorkTree(tree.top).unlisted).startswith("git trusts no folder that somebody else owns; git config --gl")
    tell_left_out(None, work_tree, wanted=False)
    tell_left_out(None, WorkTree(tree.runs.parent), wanted=True)
    assert capsys.readouterr().err == ""


def test_too_much_is_refused_by_name(tree: Tree) -> None:
    tree.write("weights.bin", "x" * 30_000)
    tree.write("small.py")
    with pytest.raises(ConfigError) as caught:
        tree.take('snapshot.size_max="20kB"')
    assert str(caught.value) == (
        f"job.toml: snapshot.size_max: less than the 29.3 KiB of code in {tree.top}; the largest: weights.bin "
        "29.3 KiB, job.toml 30 B, .gitignore 12 B (19.5 KiB); name data in .gitignore, raise it, or submit with "
        "--no-snapshot"
    )
    assert not (tree.runs / SNAPSHOTS).exists()


def test_a_file_saved_meanwhile_is_copied_as_it_is_then(tree: Tree) -> None:
    tree.write("a.py", "old\n")
    tree.write("z.py", "old\n")
    tree.commit()
    edits = iter(["new\n"])

    def edit(done_bytes: int, total_bytes: int) -> None:
        assert 0 < done_bytes <= total_bytes
        for text in edits:
            tree.write("z.py", text)

    packed = take(tree.job(), WorkTree(tree.top), tree.runs, told=edit)
    assert packed is not None and (packed.folder / "z.py").read_text() == "new\n"
    assert [path.name for path in (tree.runs / SNAPSHOTS).iterdir()] == [packed.folder.name]


def test_a_tree_that_never_rests_is_refused(tree: Tree) -> None:
    count = iter(range(99))
    with pytest.raises(ConfigError, match="changes while it is copied; wait until it is left alone"):
        take(tree.job(), WorkTree(tree.top), tree.runs, told=lambda *_: tree.write("a.py", f"{next(count)}\n") and None)
    assert not list((tree.runs / SNAPSHOTS).iterdir())


def test_of_two_that_submit_the_same_at_once_both_have_it(tree: Tree) -> None:
    others: list[Packed] = []

    def meanwhile(done_bytes: int, total_bytes: int) -> None:
        if not others:
            others.append(tree.take())

    mine = take(tree.job(), WorkTree(tree.top), tree.runs, told=meanwhile)
    assert mine is not None and mine.folder == others[0].folder
    assert [path.name for path in (tree.runs / SNAPSHOTS).iterdir()] == [mine.folder.name]


def test_a_runs_root_that_takes_nothing_is_named(tree: Tree) -> None:
    tree.runs.write_text("a file\n")
    with pytest.raises(ConfigError, match=r"storage.runs_root: cannot be written: .*--no-snapshot"):
        tree.take()


def test_what_programs_write_into_a_snapshot_is_found(tree: Tree) -> None:
    tree.write("pkg/code.py")
    tree.write("data/x")
    folder = tree.take().folder
    (folder / "pkg" / "__pycache__").mkdir()
    (folder / "pkg" / "__pycache__" / "code.pyc").touch()
    assert list(strays(folder)) == []
    (folder / "pkg" / "model.pt").touch()
    assert list(strays(folder)) == ["pkg/model.pt"]


def test_a_run_starts_in_the_folder_that_stands_for_its_own(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write("src/pkg/__init__.py")
    tree.write("jobs/here.py")
    monkeypatch.setenv("PYTHONPATH", f"{tree.top / 'src'}:/somewhere/else")
    monkeypatch.chdir(tree.top / "jobs")
    loaded = tree.job()
    spec, folder, script = preview(loaded, plan(loaded.job, loaded.site), WorkTree(Path.cwd()))
    snapshot = folder_of(loaded, WorkTree(Path.cwd()), tree.runs)
    assert snapshot is not None and not tree.runs.exists() and not folder.path.exists()
    told = (spec.provenance.workdir, spec.provenance.start_folder, spec.provenance.work_tree, spec.provenance.snapshot)
    assert told == (str(tree.top / "jobs"), str(snapshot / "jobs"), str(tree.top), str(snapshot))
    assert f'export PYTHONPATH={snapshot / "src"}"${{PYTHONPATH:+:$PYTHONPATH}}"\n' in script
    assert f"cd -- {snapshot / 'jobs'} || exit 1\n" in script


def test_editable_installations_are_imported_from_their_checkouts(tmp_path: Path) -> None:
    for name, source in (("flat", ""), ("nested", "src")):
        (tmp_path / name / source).mkdir(parents=True, exist_ok=True)
        record = tmp_path / "venv/lib/python3.12/site-packages" / f"{name}-1.dist-info" / "direct_url.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"url": f"file://{tmp_path / name}", "dir_info": {"editable": True}}))
    roots = import_roots(str(tmp_path / "venv/bin/python"), {"PYTHONPATH": "/a"})
    assert sorted(roots) == ["/a", *(str(tmp_path / name) for name in ("flat", "nested", "nested/src"))]
    assert str(Path(__file__).parents[1]) in import_roots(sys.executable, {})


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        (".env", True),
        ("conf/.env.production", True),
        (".env.example", False),
        ("server.pem", True),
        ("id_rsa", True),
        ("id_ed25519.pub", False),
        ("id_map.py", False),
        ("hf_token", True),
        ("my-Secret.yaml", True),
        ("tokenizer.json", False),
        ("token_files.py", False),
        ("tokens.bin", False),
        ("credentials.json", True),
        ("kubeconfig", True),
        ("train.py", False),
    ],
)
def test_secrets_are_known_by_name(name: str, is_secret: bool) -> None:
    assert secret_name(name) is is_secret


@pytest.mark.parametrize(
    ("text", "is_secret"),
    [
        (KEY, True),
        ("-----BEGIN RSA " + "PRIVATE KEY-----", True),
        ("-----BEGIN PUBLIC KEY-----", False),
        ("key = 'AKIA" + "A" * 16 + "'", True),
        ("ghp_" + "a" * 36, True),
        ("hf_" + "a" * 34, True),
        ("hf_transfer", False),
    ],
)
def test_secrets_are_known_by_what_they_hold(text: str, is_secret: bool) -> None:
    assert secret_content(text.encode()) is is_secret


def test_a_bar_is_for_copies_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int]] = []

    @contextmanager
    def bar(title: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
        shown.append((title, total))
        yield lambda done: shown.append(("done", done))

    clock = iter([0.0, 0.1, 0.7])
    monkeypatch.setattr("cfe_hpc.cli.packing.bar", bar)
    monkeypatch.setattr("cfe_hpc.cli.packing.time.monotonic", lambda: next(clock))
    with packing() as told:
        told(10, 100)
        assert shown == []
        told(30, 100)
        told(100, 100)
    assert shown == [("copying code", 100), ("done", 30), ("done", 70)]
