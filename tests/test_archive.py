"""Archives: fetched by pip, checked, read in place."""

import hashlib
import subprocess
import zipfile

import pytest

from nanorlhf.data import archive
from nanorlhf.data.sources import load_sources


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A made-up wheel outside the cache, pinned under the name toy; returns its path."""
    path = tmp_path / "index" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("toy/data/a.txt", "hello")
        file.writestr("toy/data/b.md", "mark")
        file.writestr("toy/__init__.py", "raise RuntimeError('imported')")
    pinned = archive.Archive("toy", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")
    monkeypatch.setitem(archive.PINNED, "toy", pinned)
    monkeypatch.setenv("NANORLHF_CACHE", str(tmp_path / "cache"))
    return path


def fake_pip(monkeypatch, act, code=0, stderr=""):
    """Put act(target folder) in pip's place and record the commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        act(command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(archive.subprocess, "run", run)
    return commands


def test_a_fetched_archive_lies_complete_in_the_cache_and_is_fetched_once(wheel, monkeypatch, tmp_path):
    commands = fake_pip(monkeypatch, lambda folder: (open(f"{folder}/{wheel.name}", "wb").write(wheel.read_bytes())))
    first, second = archive.fetch("toy"), archive.fetch("toy")
    assert first == second == tmp_path / "cache" / wheel.name
    assert len(commands) == 1 and "toy==1.0" in commands[0] and "--no-deps" in commands[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [wheel.name]  # no temporary folder stays


def test_pip_is_told_no_index_so_the_users_settings_hold(wheel, monkeypatch):
    commands = fake_pip(monkeypatch, lambda folder: (open(f"{folder}/{wheel.name}", "wb").write(wheel.read_bytes())))
    archive.fetch("toy")
    assert not any(part.startswith(("-i", "-f", "--index", "--extra", "--find")) or "://" in part for part in commands[0])
    assert commands[0][:4] == [archive.sys.executable, "-m", "pip", "download"]


def test_members_are_read_without_unpacking_or_importing(wheel):
    assert archive.members(wheel, "toy/data/") == ["toy/data/a.txt", "toy/data/b.md"]
    assert archive.members(wheel, "toy/", ".md") == ["toy/data/b.md"]
    assert archive.read_member(wheel, "toy/data/a.txt") == b"hello"
    with pytest.raises(ValueError, match="expected toy/none inside"):
        archive.read_member(wheel, "toy/none")


def test_a_download_with_another_content_is_refused_and_not_kept(wheel, monkeypatch, tmp_path):
    fake_pip(monkeypatch, lambda folder: open(f"{folder}/{wheel.name}", "wb").write(b"something else"))
    with pytest.raises(ValueError, match="expected sha256 .* of toy 1.0, got "):
        archive.fetch("toy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_named_with_the_remedy(wheel, tmp_path):
    (tmp_path / "cache").mkdir()
    damaged = tmp_path / "cache" / wheel.name
    damaged.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{wheel.name}; delete that file"):
        archive.fetch("toy")


def test_a_failing_pip_gives_its_own_error_line_as_the_reason(wheel, monkeypatch):
    fake_pip(monkeypatch, lambda folder: None, code=1, stderr="WARNING: x\nERROR: No matching distribution\nnotice\n")
    with pytest.raises(archive.Unavailable, match="pip failed .ERROR: No matching distribution"):
        archive.fetch("toy")


def test_offline_nothing_is_run(wheel, monkeypatch):
    commands = fake_pip(monkeypatch, lambda folder: None)
    with pytest.raises(archive.Unavailable, match="toy 1.0 is not in "):
        archive.fetch("toy", offline=True)
    assert commands == []


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="expected one of"):
        archive.fetch("nothing")


def test_sources_whose_archive_cannot_be_had_are_left_out_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("NANORLHF_CACHE", str(tmp_path))
    fake_pip(monkeypatch, lambda folder: None, code=1, stderr="ERROR: no network")
    sources, left_out = load_sources(["films", "plays", "topics"])
    assert [source.name for source in sources] == ["topics"]
    assert [reason.split(":")[0] for reason in left_out] == ["films", "plays"]
    assert all("no network" in reason and "\n" not in reason for reason in left_out)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("NANORLHF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert archive.cache_folder() == tmp_path / "nanorlhf"
    monkeypatch.setenv("NANORLHF_CACHE", str(tmp_path / "own"))
    assert archive.cache_folder() == tmp_path / "own"
