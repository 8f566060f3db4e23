"""A file is replaced whole, and stays what it was to whoever links to it or may read it."""

import pytest

from open_mythos.whole import write_whole


def test_links_and_permissions_stay(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk):
    path = tmp_path / "a.json"
    path.write_text("old")
    full_disk(1)
    with pytest.raises(OSError, match=r"cannot write .*a.json: No space left on device; free some space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
