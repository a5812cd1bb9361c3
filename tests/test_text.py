import pytest
import torch

from course_utils import data, files, text


def test_the_splits_are_whole_chapters_and_share_none():
    chapters = {split: text.decode(text.king_james(split)).split("\n\n") for split in data.SPLITS}
    counts = {split: len(found) for split, found in chapters.items()}
    assert counts == {"train": 1010, "calibration": 60, "validation": 60, "test": 59}  # of 1,189
    flat = [chapter for found in chapters.values() for chapter in found]
    assert len(set(flat)) == len(flat)
    assert chapters["validation"][0].startswith("In the beginning God created the heaven and the earth.\n")


def test_all_of_the_text_is_in_the_splits():
    total = sum(len(text.king_james(split)) for split in data.SPLITS)
    borders = 3  # between the four splits there are no two line ends as between chapters
    assert total + 2 * borders == 4_139_035
    assert all(text.king_james(split).dtype == torch.uint8 for split in data.SPLITS)
    assert set(text.king_james("train").tolist()) == set(range(len(text.SYMBOLS)))


def test_what_is_encoded_comes_back():
    words = "Jesus wept.\nQuestion? (yes!) 'o-o': a;b"
    assert text.decode(text.encode(words)) == words
    assert text.encode("\n !").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="knows no '7', 'é'"):
        text.encode("é7")


def test_sequences_follow_one_another_and_targets_are_one_further_on():
    x, y = text.sequences(torch.arange(11, dtype=torch.uint8), 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and torch.equal(y, x + 1)
    assert x.dtype == torch.int64
    x, y = text.sequences(torch.arange(19, dtype=torch.uint8), 3, limit=3)
    assert x.tolist() == [[0, 1, 2], [6, 7, 8], [12, 13, 14]] and torch.equal(y, x + 1)
    assert len(text.sequences(torch.arange(11, dtype=torch.uint8), 3, limit=9)[0]) == 3
    with pytest.raises(ValueError, match="3 characters are too few for a sequence of 3"):
        text.sequences(torch.arange(3, dtype=torch.uint8), 3)


def test_an_unknown_split_and_an_altered_file_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'tests'"):
        text.king_james("tests")
    target = tmp_path / text.FILE
    target.parent.mkdir()
    content = bytearray((files.data_dir() / text.FILE).read_bytes())
    content[1000] ^= 1
    target.write_bytes(content)
    (tmp_path / files.MANIFEST).write_bytes((files.data_dir() / files.MANIFEST).read_bytes())
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    text._splits.cache_clear()
    with pytest.raises(files.DataFileError, match="king_james_bible.txt.gz was altered"):
        text.king_james("test")
    text._splits.cache_clear()
