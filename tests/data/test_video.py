"""Videos are decoded with imageio, and errors name the file or the missing package."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from msflow_ext.data import Frame, Images, load_image, open_dataset


@pytest.fixture
def videos(tmp_path):
    """Return the folder of the training videos of a data set."""
    folder = tmp_path / "training/videos"
    folder.mkdir(parents=True)
    return folder


def test_a_video_gives_the_items_that_a_folder_of_its_frames_gives(tmp_path, videos, save):
    pytest.importorskip("imageio.v3")
    frames = [Image.new("L", (8, 6), 16 * i) for i in range(12)]
    frames[0].save(videos / "01_001.gif", save_all=True, append_images=frames[1:], duration=40)
    for i in range(12):
        save(tmp_path / f"training/frames/02_001/{i:03}.png", 16 * i)
    video, folder = (open_dataset(tmp_path, "mstc", scene).train for scene in ("01", "02"))
    assert [item.name.replace("01_", "02_") for item in video] == [item.name for item in folder]
    assert [item.image for item in video] == [Frame(videos / "01_001.gif", i) for i in (0, 5, 10)]
    seen, expected = (Images(items, 4) for items in (video, folder))
    assert all(torch.equal(seen[i], expected[i]) for i in range(3))


@pytest.fixture
def fresh_imageio(monkeypatch):
    """Make the test import imageio and its plugins again."""
    for module in list(sys.modules):
        if module.split(".")[0] == "imageio":
            monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("name", ["01_001.gif", "01_001.GIF"])
@pytest.mark.usefixtures("fresh_imageio")
def test_a_gif_needs_no_video_library(videos, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "av", None)
    pytest.importorskip("imageio.v3")
    frames = [Image.new("L", (8, 6), 16 * i) for i in range(6)]
    frames[0].save(videos / name, save_all=True, append_images=frames[1:], duration=40)
    (first, last) = open_dataset(videos.parents[1], "mstc", "01").train
    assert [np.asarray(load_image(item.image)).max() for item in (first, last)] == [0, 80]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_of_a_compressed_video_come_in_any_order_and_from_many_threads(videos, suffix):
    """An mkv file does not say how many frames it has."""
    pytest.importorskip("av")
    imageio = pytest.importorskip("imageio.v3")
    grays = np.arange(20, 220, 5, dtype=np.uint8)
    path = videos / f"01_001.{suffix}"
    film = np.broadcast_to(grays[:, None, None, None], (40, 32, 48, 3)).copy()
    imageio.imwrite(path, film, plugin="pyav", codec="mpeg4", fps=25)
    frames = open_dataset(videos.parents[1], "mstc", "01").train
    assert [item.image for item in frames] == [Frame(path, i) for i in range(0, 40, 5)]
    order = [0, 5, 10, 10, 35, 20, 0, 39, 1]

    def worst(_):
        seen = [np.asarray(load_image(Frame(path, i))).mean() for i in order]
        return np.abs(seen - grays[order].astype(float)).max()

    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(worst, range(3))) < 2.5  # one frame differs from the next by 5


def test_a_video_that_cannot_be_decoded_is_named(tmp_path, videos):
    pytest.importorskip("imageio.v3")
    (videos / "03_001.gif").write_bytes(b"GIF89a, cut off")
    with pytest.raises(ValueError, match=r"video .*03_001\.gif cannot be decoded: "):
        open_dataset(tmp_path, "mstc", "03")
    with pytest.raises(FileNotFoundError, match=r"gone\.avi is not a file"):
        load_image(Frame(videos / "gone.avi", 0))


@pytest.mark.parametrize(("name", "missing"), [("03_001.gif", "imageio"), ("03_001.avi", "av")])
@pytest.mark.usefixtures("fresh_imageio")
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, videos, monkeypatch, name, missing
):
    (videos / name).write_bytes(b"RIFF")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs .* pip install imageio av"):
        open_dataset(tmp_path, "mstc", "03")


@pytest.mark.family("image files")
@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv", "mov"])
def test_a_playlist_with_the_suffix_of_a_video_is_refused(tmp_path, suffix):
    """FFmpeg would open the files that the playlist names."""
    pytest.importorskip("av")
    imageio = pytest.importorskip("imageio.v3")
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    imageio.imwrite(tmp_path / "inside.mkv", frames, plugin="pyav", codec="libx264")
    playlist = tmp_path / f"playlist.{suffix}"
    playlist.write_text("ffconcat version 1.0\nfile inside.mkv\n")
    with pytest.raises(ValueError, match=r"video .*playlist\.\w+ cannot be decoded"):
        load_image(Frame(playlist, 0))


@pytest.mark.family("image files")
def test_another_image_format_with_the_suffix_gif_is_refused(tmp_path):
    pytest.importorskip("imageio.v3")
    Image.new("L", (8, 8)).save(tmp_path / "clip.png")
    (tmp_path / "clip.png").rename(tmp_path / "clip.gif")
    with pytest.raises(ValueError, match=r"video .*clip\.gif cannot be decoded"):
        load_image(Frame(tmp_path / "clip.gif", 0))
