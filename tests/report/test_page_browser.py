"""The page of a comparison in a real browser, headless."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.report.test_report import check_numbers, read_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--enable-logging=stderr", "--hide-scrollbars",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """Return the first browser of the Chromium family on PATH."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"needs one of {', '.join(BROWSERS)} on PATH (Debian: apt install chromium)")
    return found[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory, root):
    """Page, plot and JSON as the command writes them."""
    folder = tmp_path_factory.mktemp("compare")
    command = [
        sys.executable, "-m", "voltana_ctrl.cli", "compare", "--rate", "10,65", "--duration", "30",
        "--warmup", "5", "--seeds", "2", "--html", "out.html", "--plot", "out.png", "--json",
        "out.json",
    ]  # fmt: skip
    subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(root), "HOME": str(folder)}, check=True,
        timeout=300,
    )  # fmt: skip
    return folder


def open_page(browser, path, profile, *options):
    """Standard output, and what the page wrote to the console."""
    done = subprocess.run(
        [browser, *QUIET, f"--user-data-dir={profile}", *options, path.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return done.stdout, re.findall(r"^.*:CONSOLE[:(].*$", done.stderr, re.MULTILINE)


@pytest.fixture(scope="module")
def opened(browser, made, tmp_path_factory):
    return open_page(browser, made / "out.html", tmp_path_factory.mktemp("profile"), "--dump-dom")


def test_the_page_opens_without_a_console_message(opened):
    _, console = opened
    assert console == []


def test_a_page_that_would_fetch_is_heard(browser, made, tmp_path):
    text = (made / "out.html").read_text(encoding="utf-8")
    broken = made / "broken.html"
    image = '<img src="https://example.invalid/a.png" alt="">'
    broken.write_text(text.replace("<main>", f"<main>{image}"), encoding="utf-8")
    _, console = open_page(browser, broken, tmp_path, "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


def test_figures_and_numbers_stand_in_the_browser(opened, made):
    comparison = json.loads((made / "out.json").read_text())
    page = read_page(opened[0])
    assert len(page.figures) == 2 + 2 * 2
    assert all(label.endswith("(simulated)") for label in page.figures)
    check_numbers(page, comparison)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_painted_on_light_and_on_dark(browser, made, tmp_path, scheme):
    shot = tmp_path / "page.png"
    setting = f"preferredColorScheme={int(scheme == 'light')}"
    open_page(
        browser, made / "out.html", tmp_path / "profile", f"--screenshot={shot}",
        "--window-size=1000,1400", f"--blink-settings={setting}",
    )  # fmt: skip
    from matplotlib.image import imread

    pixels = (imread(shot)[..., :3] * 255).round().astype(int)
    ground = {"light": (255, 255, 255), "dark": (0x15, 0x18, 0x1C)}[scheme]
    first_policy = {"light": (0x00, 0x72, 0xB2), "dark": (0x1F, 0x7F, 0xC8)}[scheme]
    assert (pixels[0, 0] == ground).all()
    assert (pixels == first_policy).all(axis=2).sum() > 200


def test_the_plot_is_an_image_of_all_figures(made):
    from matplotlib.image import imread

    height, width, _ = imread(made / "out.png").shape
    assert width == pytest.approx(7.2 * 144, abs=1.0)
    assert height > 2 * width
