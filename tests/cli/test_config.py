"""Every option may stand in a file; what is typed comes first; what does not fit is named."""

import pytest
import typer
from typer.testing import CliRunner

from voltana_ctrl import ConfigError
from voltana_ctrl.cli import app
from voltana_ctrl.cli.config import configurable


@pytest.fixture
def taken():
    """A command that tells what it was given."""
    found = {}

    def command(
        rate: str | None = None,
        seeds: int = 1,
        slo: str = "ttft=0.6,itl=0.06",
        gpu: list[str] | None = typer.Option(None),  # noqa: B008
        dry_run: bool = typer.Option(False, "--dry-run"),
    ) -> None:
        found.update(rate=rate, seeds=seeds, slo=slo, gpu=gpu, dry_run=dry_run)

    own = typer.Typer()
    own.command()(configurable(command))

    def run(*arguments):
        found.clear()
        done = CliRunner().invoke(own, list(arguments))
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return dict(found)

    return run


def test_options_are_read_and_typed_ones_come_first(taken, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'rate = [10, 20.5]\nseeds = 3\ngpu = ["GPU-1", "GPU-2"]\n"dry-run" = true\n'
        "slo = { ttft = 0.5, itl = 0.05 }\n"
    )
    assert taken("--config", str(path)) == {
        "rate": "10,20.5", "seeds": 3, "slo": "ttft=0.5,itl=0.05", "gpu": ["GPU-1", "GPU-2"],
        "dry_run": True,
    }  # fmt: skip
    assert taken("--seeds", "5", "--config", str(path))["seeds"] == 5
    assert taken()["rate"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rates = 3", "no option 'rates'; did you mean rate?"),
        ("rate = ", "expected TOML"),
        (None, "cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(taken, tmp_path, text, words):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        taken("--config", str(path))


def test_every_command_takes_a_file_and_shows_examples_that_are_its_own():
    commands = typer.main.get_command(app).commands
    for name, one in commands.items():
        assert "--config" in {option for param in one.params for option in param.opts}, name
        examples = one.epilog.split("\n\n")
        assert examples[0] == "Examples:"
        known = {option for param in one.params for option in param.opts}
        for example in examples[1:]:
            words = example.split()
            assert words[:2] == ["voltana-ctrl", name]
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, example
