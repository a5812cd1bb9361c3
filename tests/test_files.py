import json
import subprocess
import sys

import pytest
import torch

from course_utils import files


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """A data folder with one file and a manifest that fits it."""
    folder = tmp_path / "data"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "letters.txt").write_text("abcdef")
    monkeypatch.setenv("COURSE_DATA", str(folder))
    (folder / files.MANIFEST).write_text("{}")
    files.update_manifest("letters.txt", licence="MIT")
    return folder


def test_replacing_puts_the_new_file_in_place(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        with files.replacing(target) as partial:
            partial.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_the_old_file_stays_whole_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with files.replacing(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old" and partial.parent == target.parent


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(target) as partial:
        partial.write_text("half a n")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    program = (
        "import os, signal, sys; from course_utils import files\n"
        "with files.replacing(sys.argv[1]) as partial:\n"
        "    partial.write_text('half a n'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(target)]).returncode == -9
    assert target.read_text() == "old"


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    target = tmp_path / "file.txt"
    files.write_text(target, "first")
    assert target.stat().st_mode & 0o777 == 0o644
    target.chmod(0o755)
    files.write_text(target, "second")
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_whole_file_is_verified(small_data):
    assert files.verified("letters.txt") == small_data / "letters.txt"


def test_update_manifest_states_what_is_there_and_keeps_other_entries(small_data):
    (small_data / "checkpoints" / "a.bin").write_bytes(b"123")
    files.update_manifest("checkpoints/a.bin", seconds=5)
    entries = json.loads((small_data / files.MANIFEST).read_text())
    assert entries["checkpoints/a.bin"] == {
        "bytes": 3,
        "sha256": "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3",
        "seconds": 5,
    }
    assert entries["letters.txt"]["licence"] == "MIT"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), ["is missing", "expected 6 bytes"]),
        (lambda path: path.write_text("abc"), ["has 3 bytes", "expected 6"]),
        (lambda path: path.write_text("abcdeF"), ["altered", "sha256", "expected bef57ec7f53a"]),
    ],
    ids=["missing", "truncated", "altered"],
)
def test_a_damaged_file_is_named_with_what_was_expected_and_how_to_restore_it(small_data, damage, said):
    damage(small_data / "letters.txt")
    with pytest.raises(files.DataFileError) as caught:
        files.verified("letters.txt")
    for words in [str(small_data / "letters.txt"), "git checkout -- data/letters.txt", *said]:
        assert words in str(caught.value)


def test_alteration_is_noticed_after_a_file_was_found_whole(small_data):
    files.verified("letters.txt")
    (small_data / "letters.txt").write_text("fedcba")
    with pytest.raises(files.DataFileError, match="altered"):
        files.verified("letters.txt")


def test_a_checkpoint_can_also_be_trained_again(small_data):
    (small_data / "checkpoints" / "a.bin").write_bytes(b"123")
    files.update_manifest("checkpoints/a.bin")
    (small_data / "checkpoints" / "a.bin").unlink()
    with pytest.raises(files.DataFileError, match="make train"):
        files.verified("checkpoints/a.bin")


def test_a_file_without_entry_is_an_error_about_the_manifest(small_data):
    with pytest.raises(files.DataFileError, match=f"strange.txt has no entry in {files.MANIFEST}"):
        files.verified("strange.txt")


NO_MANIFESTS = {
    "cut": '{"letters.txt": ',
    "list": "[]",
    "binary": "\0",
    "deep": "[" * 100_000,
    "no entry": '{"letters.txt": 6}',
    "no checksum": '{"letters.txt": {"bytes": 6}}',
    "no size": '{"letters.txt": {"bytes": "six", "sha256": ""}}',
}


@pytest.mark.parametrize("content", NO_MANIFESTS.values(), ids=NO_MANIFESTS)
def test_a_manifest_that_cannot_be_read_is_one_clear_error(small_data, content):
    (small_data / files.MANIFEST).write_text(content)
    with pytest.raises(files.DataFileError) as caught:
        files.verified("letters.txt")
    for words in (str(small_data / files.MANIFEST), "not valid", f"git checkout -- data/{files.MANIFEST}"):
        assert words in str(caught.value)


def test_a_folder_without_manifest_is_not_taken_for_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    with pytest.raises(files.DataFileError, match="COURSE_DATA"):
        files.data_dir()


def test_results_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "mine"))
    assert files.results_dir() == tmp_path / "mine" and (tmp_path / "mine").is_dir()


def test_results_of_a_read_only_checkout_go_to_the_temporary_folder_and_that_is_said_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(files, "is_writable", lambda folder: False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    found = {files.results_dir() for _ in range(3)}
    assert found == {files.temporary_dir()} and files.temporary_dir().parent == tmp_path
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{tmp_path / 'results'} cannot be written: results go to {files.temporary_dir()} "
        "(COURSE_RESULTS may name another folder)."
    ]


def test_a_folder_that_is_there_and_takes_files_is_writable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    found = {name: files.is_writable(tmp_path / name) for name in ("", "file", "absent")}
    assert found == {"": True, "file": False, "absent": False}
    monkeypatch.setattr(files.os, "access", lambda path, mode: mode != files.os.W_OK)
    assert not files.is_writable(tmp_path)


def test_two_users_have_two_temporary_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    found = []
    for user in (1000, 1001):
        monkeypatch.setattr(files.os, "getuid", lambda user=user: user, raising=False)
        found.append(files.temporary_dir())
    assert len(set(found)) == 2 and all(folder.is_dir() for folder in found)


def test_what_can_be_made_again_goes_to_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / files.FOLDER and files.cache_dir().is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert files.cache_dir() == tmp_path / "mine" / files.FOLDER


def test_without_a_home_that_takes_files_it_goes_to_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").touch()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    assert files.cache_dir() == files.temporary_dir() and files.temporary_dir().parent == tmp_path / "temporary"

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "home", nowhere)
    assert files.cache_dir() == files.temporary_dir()


def test_tensors_of_any_strides_are_saved(tmp_path):
    tensors = {"a": torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)}
    tensors["b"] = tensors["a"].flatten(1).T[::2]
    path = tmp_path / "tensors"
    for facts, saved in (({"n": 1}, tensors), ({}, {"b": tensors["b"][:1]})):
        assert files.save_tensors(path, saved, facts) == path.stat().st_size
        read, found = files.load_tensors(path, remedy="")
        files.check_tensors(path, read, found, remedy="")
        assert read == facts and found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts, tensors: facts.update(n=2),
        lambda facts, tensors: facts.pop("sha256"),
        lambda facts, tensors: tensors["a"].add_(1),
        lambda facts, tensors: tensors.update(a=tensors["a"].reshape(3, 2)),
        lambda facts, tensors: tensors.update(b=tensors.pop("a")),
    ],
    ids=["fact", "no checksum", "number", "shape", "name"],
)
def test_what_differs_from_what_was_saved_is_damaged(damage, tmp_path):
    files.save_tensors(tmp_path / "tensors", {"a": torch.arange(6.0).reshape(2, 3)}, {"n": 1})
    facts, tensors = files.load_tensors(tmp_path / "tensors", remedy="")
    damage(facts, tensors)
    with pytest.raises(ValueError, match="tensors is damaged: .* or train it again"):
        files.check_tensors(tmp_path / "tensors", facts, tensors, remedy="train it again")
