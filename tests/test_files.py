"""Files of ours: nobody else may have written them, and none is ever half there."""

import os

import pytest

from voltana_ctrl import ConfigError
from voltana_ctrl.files import own_folder, read_ours, replace_file


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "made" / "state"
    replace_file(path, b"old", durable=True)

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in path.parent.iterdir()] == ["state"]


def test_what_lies_where_the_new_content_is_made_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".state.{os.getpid()}").symlink_to(victim)
    replace_file(tmp_path / "state", b"new", mode=0o600)
    assert victim.read_text() == "precious"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_only_what_we_or_root_wrote_is_read(tmp_path):
    path = tmp_path / "state"
    assert read_ours(path, "state", 10) is None
    path.write_bytes(b"0123456789")
    assert read_ours(path, "state", 10) == b"0123456789"
    with pytest.raises(ConfigError, match="expected at most 9 bytes"):
        read_ours(path, "state", 9)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ours(tmp_path / "link", "state", 10)
    os.link(path, tmp_path / "second")
    with pytest.raises(ConfigError, match="2 links"):
        read_ours(path, "state", 10)
    (tmp_path / "second").unlink()
    tmp_path.chmod(0o1777)
    with pytest.raises(ConfigError, match="its folder: others can write it"):
        read_ours(path, "state", 10)
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="null"):
        read_ours("a\0b", "state", 10)


def test_a_folder_that_a_link_of_ours_leads_to_is_ours(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert own_folder(tmp_path / "link", "things") == tmp_path / "link"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made or read"):
        own_folder(tmp_path / "file" / "inside", "things")
    if os.geteuid() == 0:
        os.lchown(tmp_path / "link", 65534, 65534)
        with pytest.raises(ConfigError, match="a link of user 65534"):
            own_folder(tmp_path / "link", "things")
