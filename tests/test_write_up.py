"""What a run leaves for its readers: the report's page, in a browser too, and the model card."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.tiny import save_tiny

from rlcore import trainers
from rlcore.cli import main
from rlcore.errors import UserError
from rlcore.runs.reading import read_run
from rlcore.runs.report import page as page_module
from rlcore.runs.report.card import METHODS, card, write_card
from rlcore.runs.report.page import write_page
from rlcore.runs.run_record import is_sealed
from rlcore.trainers.grpo import GRPOConfig, train_grpo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = "</script><b>&\u2028"


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    rows = [json.dumps({"prompt": f"{n}+1"}) for n in range(4)] + [json.dumps({"prompt": NASTY})]
    (home / "rows.jsonl").write_text("\n".join(rows))
    (home / "held.jsonl").write_text("\n".join(rows[-2:]))
    config = GRPOConfig(
        model=save_tiny(home / "model", initializer_range=0.05), dataset=str(home / "rows.jsonl"),
        eval_dataset=str(home / "held.jsonl"), output_dir=str(home / "one"), save_steps=0,
        reward=["test_write_up:length"], per_device_train_batch_size=8, num_generations=4,
        max_completion_length=4, max_steps=3, eval_steps=1,
    )  # fmt: skip
    train_grpo(config)
    train_grpo(dataclasses.replace(config, output_dir=str(home / "two"), learning_rate=1e-2))
    return home


def data_of(page: Path) -> dict:
    return json.loads(re.search(r"const DATA = (.*);\n", page.read_text("utf-8"))[1])


def test_a_run_ends_with_its_page_and_its_card(home):
    (run,) = data_of(home / "one" / "report.html")["runs"]
    read = read_run(home / "one")
    assert run["trainer"] == "GRPO" and run["options"]["num_generations"] == "4"
    assert run["metrics"]["eval/reward"] == [list(pair) for pair in read.course("eval/reward")]
    assert next(iter(run["metrics"])) == "eval/reward"
    assert run["completions"] == read.completions and len(run["completions"]) > 9
    assert run["facts"]["rows"] == 5 and run["facts"]["versions"]["torch"]


def test_the_page_asks_nothing_of_a_network_and_no_prompt_ends_its_script(home):
    text = (home / "one" / "report.html").read_text("utf-8")
    assert not re.search(r"(src|href)=|@import|fetch\(|url\(", text)
    assert NASTY in [
        c["prompt"] for c in data_of(home / "one" / "report.html")["runs"][0]["completions"]
    ]
    assert text.count("</script>") == 1


def test_a_long_run_is_thinned_evenly_and_keeps_its_end(monkeypatch):
    assert page_module._thinned(list(range(10)), 4) == [0, 3, 6, 9]
    assert page_module._thinned(list(range(3)), 4) == [0, 1, 2]


def test_report_puts_runs_beside_each_other(home, tmp_path, capsys):
    output = tmp_path / "both.html"
    assert main(["report", str(home / "one"), str(home / "two"), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert [run["options"]["learning_rate"] for run in data_of(output)["runs"]] == ["1e-06", "0.01"]


def test_report_says_what_is_no_run(home, tmp_path, capsys):
    assert main(["report", str(home / "model")]) == 2
    assert "no run at" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot write|no such"):
        write_page([read_run(home / "one")], tmp_path / "nowhere" / "a.html")


def test_the_card_has_the_hubs_header_and_the_evaluations(home):
    text = (home / "one" / "README.md").read_text("utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["tags"] == ["rlcore", "grpo"] and "base_model" not in header
    run = read_run(home / "one")
    (line,) = [line for line in text.splitlines() if line.startswith("| reward |")]
    assert line.endswith(f"| {run.best('eval/reward')[0]} |")
    assert "`test_write_up:length`" in text and "5 rows" in text and "Qwen2ForCausalLM" in text


def test_a_card_knows_every_trainers_method():
    assert METHODS.keys() == {name for name in trainers.__all__ if name.endswith("Config")}


def test_a_card_is_ours_until_somebody_changes_it(home, tmp_path):
    run, path = read_run(home / "one"), tmp_path / "README.md"
    write_card(run, path)
    assert is_sealed(path)
    first = path.read_text("utf-8")
    write_card(dataclasses.replace(run, trainer="DPOConfig"), path)
    assert is_sealed(path) and path.read_text("utf-8") != first
    for changed in (first.replace("5 rows", "6 rows"), first + "mine", "mine"):
        path.write_text(changed, encoding="utf-8")
        write_card(run, path)
        assert not is_sealed(path) and path.read_text("utf-8") == changed


def test_the_card_names_the_hubs_models_and_data(home):
    run = read_run(home / "one")
    options = run.options | {"model": "owner/base", "dataset": "owner/rows"}
    header = yaml.safe_load(card(dataclasses.replace(run, options=options)).split("---")[1])
    assert header["base_model"] == "owner/base" and header["datasets"] == ["owner/rows"]


# clicks through the page, and says what it then shows
DRIVE = """
<script>
addEventListener("load", () => {
  const told = {};
  const $ = id => document.getElementById(id);
  const send = (id, value) => {
    $(id).value = value;
    $(id).dispatchEvent(new Event("input"));
  };
  const texts = where => [...document.querySelectorAll(where)].map(node => node.textContent);
  told.charts = document.querySelectorAll(".chart").length;
  $("every").click();
  told.all = document.querySelectorAll(".chart").length;
  send("filter", "FRAC_reward_zero");
  told.found = texts(".chart h3");
  told.lines = document.querySelectorAll(".chart path").length;
  send("smoothing", "0.9");
  told.smoothed = document.querySelectorAll(".chart path").length;
  document.querySelector("#legend input").click();
  told.alone = document.querySelectorAll(".chart path").length;
  document.querySelector("#legend input").click();
  told.last = $("stepname").textContent;
  send("step", 0);
  told.first = $("stepname").textContent;
  send("split", "1");
  told.split = $("split").selectedOptions[0].textContent;
  send("step", 1e9);
  told.prompt = document.querySelector(".sample pre").textContent;
  told.samples = document.querySelectorAll(".sample").length;
  told.differ = texts("#options tr.differs td:first-child");
  $("theme").click();
  told.theme = document.documentElement.dataset.theme;
  document.title = "";
  document.body.replaceChildren(Object.assign(document.createElement("pre"),
    {id: "told", textContent: JSON.stringify(told)}));
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_the_page_works_in_a_browser(home, tmp_path):
    page = write_page([read_run(home / "one"), read_run(home / "two")], tmp_path / "page.html")
    page.write_text(page.read_text("utf-8") + DRIVE, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-first-run",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    told = json.loads(re.search(r'<pre id="told">(.*)</pre>', done.stdout, re.DOTALL)[1])
    assert told["charts"] == 6 and told["all"] > 12
    assert told["found"] == ["frac_reward_zero_std"]
    assert (told["lines"], told["smoothed"], told["alone"]) == (2, 4, 2)
    assert (told["first"], told["last"]) == ("step 0", "step 3")
    assert told["split"] == "training" and told["samples"] >= 2 and told["prompt"]
    assert set(told["differ"]) == {"output_dir", "learning_rate"}
    assert told["theme"] in ("light", "dark")
