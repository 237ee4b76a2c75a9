"""The report: whole, self-contained, true to the numbers, and alive in a real browser."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import RecordError, ResourceError
from fedtune.report.collect import collect
from fedtune.report.page import Report, write_report
from tests.support.golden import Golden
from tests.support.synthetic import PRICING, make_record, write, write_compressed, write_grid

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GRID = {"epsilon": [0.5, 2.0, 8.0, None], "quantization": ["none", "int8", "nf4"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("runs")
    write_grid(root, seeds=2, **GRID)
    write_compressed(root / "smaller", 20.0, int8=(900.0, 0.79))
    return write_report([root])


def numbers(page: Path) -> Any:
    """The JSON that lies in the page."""
    found = re.search(
        r'<script type="application/json" id="numbers">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found is not None
    return json.loads(found.group(1))


# --- what is the owner's of private data ---------------------------------------------------------


def test_times_and_prices_of_private_data_are_shown_to_their_owner_alone(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    published = write_report([finished[0]], output=tmp_path / "published")
    (point,) = numbers(published.page)["points"]
    assert not {"train_seconds", "seconds", "peak_memory_bytes"} & set(point["cost"])
    assert {"bytes", "flops"} <= set(point["cost"])
    assert "not declared public" in published.text and "--local" in published.text
    own = write_report([finished[0]], output=tmp_path / "published", local=True)
    (point,) = numbers(own.page)["points"]
    assert {"train_seconds", "seconds", "flops"} <= set(point["cost"])
    files = (own.page, own.picture, own.csv, own.parquet)
    assert all(path.name.startswith("local-") and not path.stat().st_mode & 0o077 for path in files)
    assert not {"train_seconds", "seconds"} & set(numbers(published.page)["points"][0]["cost"])
    assert "Not for publication" in own.text and "(not for publication)</title>" in own.page.read_text()


# --- files ---------------------------------------------------------------------------------------


def test_everything_is_written_and_said(made: Report) -> None:
    assert made.page.parent == made.picture.parent == made.csv.parent
    assert made.picture.read_bytes().startswith(b"\x89PNG") and made.picture.stat().st_size > 20_000
    assert "24 runs of 12 configurations" in made.text and "Choose epsilon" in made.text
    assert "at delta" in made.text and "over all 18 private runs of this report" in made.text
    assert not list(made.page.parent.glob(".*.part"))


def test_the_page_needs_nothing_else(made: Report) -> None:
    text = made.page.read_text()
    assert made.page.stat().st_size < 700_000
    assert "default-src 'none'" in text, "the browser itself refuses whatever the page would load"
    own = text.replace(library(), "")
    assert len(own) < len(text) and not re.findall(r"https?://", own)
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", own) == ["data:,"]
    assert "@import" not in own and "url(" not in own and "%NUMBERS%" not in own


# As npm publishes them: d3 7.9.2 and @observablehq/plot 0.6.17, both under the ISC licence.
VENDORED = {
    "d3.min.js": "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    "plot.min.js": "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
}


def library() -> str:
    folder = resources.files("fedtune.report") / "templates" / "vendor"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in VENDORED)


@pytest.mark.parametrize("name", VENDORED)
def test_the_chart_library_is_as_it_was_published(name: str) -> None:
    folder = resources.files("fedtune.report") / "templates" / "vendor"
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == VENDORED[name]
    licence = (folder / name.replace(".min.js", ".LICENSE")).read_text(encoding="utf-8")
    assert "Permission to use, copy, modify, and/or distribute this software" in licence


def test_csv_and_parquet_have_the_same_rows(made: Report) -> None:
    import pyarrow.parquet as pq

    with made.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(made.parquet).to_pylist()
    assert len(rows) == len(table) == 12
    for row, other in zip(rows, table, strict=True):
        assert list(row) == list(other)
        assert row["configuration"] == other["configuration"] and row["command"].startswith("fedtune run -m ")
        assert math.isclose(float(row["accuracy"]), other["accuracy"])
        private = row["private"] == "True"
        assert private == other["private"] == (row["epsilon"] != "") == (other["epsilon"] is not None)
        assert row["delta"] or not private, "no epsilon without its delta"
    assert sum(row["non_dominated_epsilon"] == "True" for row in rows) >= 3


def test_numbers_in_the_page_are_those_of_the_records(made: Report) -> None:
    data = numbers(made.page)
    found = collect([made.page.parent])
    assert sum(len(point["runs"]) for point in data["points"]) == len(found.runs)
    point = next(p for p in data["points"] if p["set"] == {
        "model.quantization": "nf4", "privacy.trust": "local", "privacy.epsilon": 2.0})  # fmt: skip
    mine = [run for run in found.runs if run.config["privacy"]["epsilon"] == 2.0]
    mine = [run for run in mine if run.config["model"]["quantization"] == "nf4"]
    assert point["acc"][2] == len(mine) == 2
    assert math.isclose(point["acc"][0], sum(run.accuracy or 0 for run in mine) / 2, rel_tol=1e-5)
    assert len(point["runs"][0]["curve"]) == 6 and set(point["sites"]) == {
        "editorials",
        "movies",
        "products",
        "tweets",
    }
    assert {**data["base"], **point["set"]}.keys() >= {"train.learning_rate", "privacy.max_grad_norm"}
    (group,) = data["groups"]
    assert (
        group["promise"].startswith("Epsilon ")
        and "delta" in group["promise"]
        and "unit record" in group["promise"]
    )
    assert group["tuning"]["alone"] < group["tuning"]["composed"] and group["tuning"]["best_of"] is None


def test_texts_from_records_cannot_end_the_script(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    write(tmp_path / "0", make_record(dataset=evil))
    text = write_report([tmp_path]).page.read_text()
    assert evil not in text and text.count("</script>") == 3
    assert evil in numbers(tmp_path / "report.html")["groups"][0]["name"]


@pytest.mark.slow
def test_other_prices(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record())
    before = numbers(write_report([tmp_path]).page)
    after = numbers(write_report([tmp_path], ["pricing=edge"], tmp_path / "deep" / "er").page)
    assert before["book"].startswith("cloud_cpu") and after["book"].startswith("edge")
    assert before["points"][0]["cost"]["money"] != after["points"][0]["cost"]["money"]
    assert after["command"].endswith("pricing=edge")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "0", make_record())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="--output"):
        write_report([tmp_path], [], tmp_path / "file")


def test_nothing_to_report(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(RecordError) as raised:
        write_report([tmp_path])
    assert "record.json" in str(raised.value)
    golden(raised)
    assert list(tmp_path.iterdir()) == []


CASES = "one run, no privacy, no accuracy, no price, no rounds, no sites, two data sets, private selection, search"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.split(", "))
def test_odd_collections_make_a_sensible_page(tmp_path: Path, case: str) -> None:
    first, second = make_record(), make_record(seed=1)
    if case == "no privacy":
        first, second = make_record(epsilon=None), make_record(epsilon=None, seed=1)
    if case == "no accuracy":
        first["metrics"]["accuracy"] = second["metrics"]["accuracy"] = None
    if case == "no price":
        first["cost"]["pricing"] = second["cost"]["pricing"] = None
        first["cost"]["money"] = second["cost"]["money"] = None
    if case == "no rounds":
        first["metrics"]["by_round"] = second["metrics"]["by_round"] = []
    if case == "no sites":
        first["metrics"]["per_site"] = second["metrics"]["per_site"] = {}
    if case == "two data sets":
        second = make_record(dataset="tickets")
    if case == "private selection":
        kept = {"private_selection": {"mean": 5.0, "shape": None, "trials": 2}}
        (tmp_path / "sweep.json").write_text(json.dumps(kept))
    if case == "search":
        (tmp_path / "sweep.json").write_text(json.dumps({"search": {"identity": {"searched": ["seed=0,1"]}}}))
    write(tmp_path / "0", first)
    if case != "one run":
        write(tmp_path / "1", second)
    made = write_report([tmp_path])
    data = numbers(made.page)
    assert made.picture.stat().st_size > 5_000
    if case == "two data sets":
        assert len(data["groups"]) == 2 and any("2 different questions" in note for note in data["notes"])
    if case == "no price":
        assert any("Money is left out" in note for note in data["notes"])
    if case == "no privacy":
        assert data["groups"][0]["tuning"] is None and "epsilon is infinite" in made.text
    if case == "no accuracy":  # nothing can be chosen, and what was promised stays promised
        promise = data["groups"][0]["promise"]
        assert promise.startswith("Epsilon 7.") and "infinite" not in made.text
        assert " at delta 5.6e-05, unit record, " in promise and ", trust " in promise
    if case == "private selection":
        assert data["groups"][0]["tuning"]["best_of"] > data["groups"][0]["tuning"]["alone"]
    if case == "search":
        assert "2 of them chosen by a search" in made.text
        assert data["groups"][0]["tuning"]["search"].startswith("These runs were chosen by a search")
    if BROWSER and case in ("no accuracy", "two data sets", "search"):
        seen = in_browser(made.page, "return document.body.innerText")
        assert seen["errors"] == []
        assert ("a search chose these" in seen["value"]) is (case == "search")


@pytest.mark.slow
def test_where_none_is_chosen_epsilon_has_its_delta_unit_and_adjacency(tmp_path: Path) -> None:
    """An accuracy that the noise hid is not there; the promises are."""
    for position, epsilon in enumerate((1.0, 4.0, None)):
        made = make_record(epsilon=epsilon)
        made["metrics"]["accuracy"] = None
        for one in made["metrics"]["by_round"]:
            one["accuracy"] = None
        write(tmp_path / str(position), made)
    promise = numbers(write_report([tmp_path]).page)["groups"][0]["promise"]
    assert re.match(
        r"Epsilon 0\.\d+ to 3\.\d+ at delta 5.6e-05, unit record, add or remove one record, ", promise
    )
    assert "trust local, by configuration" in promise and "1 of 3 configurations have no guarantee" in promise


def test_a_cost_that_is_equal_for_all_is_no_trade_off(tmp_path: Path) -> None:
    first, second = make_record(), make_record(epsilon=2.0)
    for record, more in ((first, 0), (second, 9)):
        record["cost"].update(bytes_up=2000 + more, bytes_down=2000, train_seconds=100.0 + 20 * more)
        record["run"]["seconds"] = 120.0 + 20 * more
    write(tmp_path / "0", first)
    write(tmp_path / "1", second)
    page = write_report([tmp_path]).page
    (group,) = numbers(page)["groups"]
    assert "bytes" in group["equal"] and not {"seconds", "train_seconds"} & set(group["equal"])
    if BROWSER:
        seen = in_browser(
            page,
            "return [document.body.innerText,"
            " [...document.querySelectorAll('[data-axis]')].map((one) => one.dataset.axis)]",
        )
        assert seen["errors"] == []
        text, axes = seen["value"]
        assert "bytes" not in axes and "eps" in axes
        assert "The same for all, within a percent: bytes sent, up and down (4 kB)" in text


def test_a_cost_that_differs_no_more_than_runs_of_one_configuration_has_no_panel(tmp_path: Path) -> None:
    for number, (epsilon, seconds, flops) in enumerate(
        [(2.0, 100, 10), (2.0, 110, 12), (2.0, 90, 11), (8.0, 104, 20), (8.0, 95, 21), (8.0, 108, 22)]
    ):
        record = make_record(epsilon=epsilon, seed=number % 3)
        record["cost"].update(train_seconds=float(seconds), flops=flops)
        write(tmp_path / str(number), record)
    (group,) = numbers(write_report([tmp_path]).page)["groups"]
    assert "train_seconds" in group["noise"] and "flops" not in group["noise"] + group["equal"]


@pytest.mark.parametrize("dearer", [False, True])
def test_a_cost_that_drifts_over_a_sweep_has_no_panel_unless_a_choice_changes_it(
    tmp_path: Path, dearer: bool
) -> None:
    """Runs of one configuration are neighbours, so that a drift looks like a difference between them."""
    scatter = [3, -2, 1, -3, 2, 0, -1, 3, -2]
    for number, off in enumerate(scatter):
        record = make_record(epsilon=(2.0, 4.0, 8.0)[number // 3], seed=number % 3)
        record["run"]["started"] = f"2026-12-01T10:{number:02}:00+00:00"
        more = 100 if dearer and number // 3 == 1 else 0
        record["cost"]["peak_memory_bytes"] = (1000 + 10 * number + off + more) * 1_000_000
        write(tmp_path / str(number), record)
    (group,) = numbers(write_report([tmp_path]).page)["groups"]
    assert ("peak_memory_bytes" not in group["noise"] + group["equal"]) is dearer


def test_each_point_is_compared_with_the_recommended_one_seed_by_seed(tmp_path: Path) -> None:
    accuracies = {8.0: {0: 0.80, 1: 0.70, 2: 0.75}, 2.0: {0: 0.70, 1: 0.602, 2: 0.648}, 0.5: {7: 0.5}}
    for epsilon, by_seed in accuracies.items():
        for seed, accuracy in by_seed.items():
            write(tmp_path / f"{epsilon}-{seed}", make_record(epsilon=epsilon, seed=seed, accuracy=accuracy))
    data = numbers(write_report([tmp_path]).page)
    small, middle, large = sorted(data["points"], key=lambda point: point["eps"])
    assert data["groups"][0]["chosen"] == large["id"] and large["beside"] is None
    assert middle["beside"] == pytest.approx([-0.1, 0.001155, 3], rel=1e-3)  # each alone: ± 0.03
    assert small["beside"] == pytest.approx([-0.25, 0.02887, 0], rel=1e-3)
    if BROWSER:
        point_at = (
            f'document.querySelector(`.mark[data-id="{middle["id"]}"]`).dispatchEvent(new Event("focus"));'
        )
        seen = in_browser(
            tmp_path / "report.html", f"{point_at} return document.getElementById('tip').innerText"
        )
        assert "10.0 ± 0.1 points below the recommended one (over 3 common seeds)" in seen["value"]
        assert seen["errors"] == []


def test_both_a_light_and_a_dark_page_have_every_colour_and_charts_have_no_other() -> None:
    parts = resources.files("fedtune.report") / "templates"
    style = (parts / "report.css").read_text()
    light, dark = (
        set(re.findall(r"--([\w-]+):", part)) for part in re.findall(r":root \{(.*?)\n\s*\}", style, re.S)
    )
    assert light == dark and "prefers-color-scheme: dark" in style
    used = set(re.findall(r"var\(--([\w-]+)\)", style))
    charts = (parts / "charts.js").read_text()
    named = re.search(r"= \[(.*?)\]\.map\(\(name\) => `var", charts)
    assert named is not None
    used |= {
        *json.loads(f"[{named.group(1)}]"),
        *(f"series-{i}" for i in range(7)),
        *(f"ramp-{i}" for i in range(6)),
    }
    assert used <= light
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b", charts.replace("#fedtune", "")), "a colour of its own"


@pytest.mark.slow
def test_one_configuration_has_no_adoption_to_show(tmp_path: Path, made: Report) -> None:
    write(tmp_path / "0", make_record())
    write(tmp_path / "1", make_record(seed=1))
    page = write_report([tmp_path]).page
    assert [len(numbers(page)["points"]), numbers(page)["groups"][0]["adoption"]] == [1, None]
    assert numbers(made.page)["groups"][0]["adoption"] is not None
    if BROWSER:
        seen = in_browser(page, "return document.body.innerText")
        assert seen["errors"] == [] and "Adoption:" not in seen["value"]


def test_reproducible_noise_is_shown(tmp_path: Path) -> None:
    made = make_record()
    made["privacy"]["reproducible_noise"] = True
    write(tmp_path, made)
    text = write_report([tmp_path]).text
    assert "protects nobody" in text and "drew their noise from the seed" in text


# --- size and time -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_records(tmp_path: Path) -> None:
    axes: dict[str, list[Any]] = {
        "epsilon": [0.5, 1.0, 2.0, 4.0, 8.0],
        "quantization": ["none", "int8", "nf4"],
        "adapter": ["lora", "ffa_lora", "head", "bitfit"],
        "train__learning_rate": [0.0005, 0.001, 0.002, 0.004],
    }
    assert write_grid(tmp_path, seeds=5, **axes) == 1200
    made = write_report([tmp_path])
    assert made.page.stat().st_size < 2_000_000


@pytest.mark.slow
def test_ten_thousand_runs(tmp_path: Path) -> None:
    text = json.dumps(make_record(curve=False))
    for i in range(10_000):
        folder = tmp_path / str(i // 100) / str(i)
        folder.mkdir(parents=True)
        changed = re.sub(
            r'"learning_rate": [0-9.]+', f'"learning_rate": {1e-4 * (i // 10 + 1):.4f}', text, count=1
        )
        identity = re.sub(r'"id": "\w+"', f'"id": "{i:016x}"', changed, count=1)
        (folder / "record.json").write_text(identity)
    made = write_report([tmp_path])
    assert made.page.stat().st_size < 10_000_000 and "10,000 runs of 1,000 configurations" in made.text


# --- in a real browser ---------------------------------------------------------------------------

# Scripts are written as they are read, however long their lines get.
# ruff: noqa: E501
HARNESS = """
<script>
window.errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => errors.push(words.join(" "));
</script>
"""


def in_browser(page: Path, script: str, width: int = 1100) -> Any:
    """What `script` returns in the loaded page, with the errors on its console."""
    act = f"""<script>
    addEventListener("load", () => setTimeout(async () => {{
      let value = null;
      try {{ value = await (async () => {{ {script} }})(); }} catch (error) {{ errors.push("test: " + error.stack); }}
      const out = document.createElement("pre");
      out.id = "results";
      out.textContent = JSON.stringify({{ value, errors }});
      document.body.append(out);
    }}, 100));
    </script>"""
    text = page.read_text().replace("<head>", "<head>" + HARNESS, 1).replace("</body>", act + "</body>", 1)
    copy = page.with_name("under-test.html")
    copy.write_text(text)
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-component-update",
            "--disable-background-networking", "--disable-sync", f"--user-data-dir={page.parent / 'browser'}",
            f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="results">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    import html

    return json.loads(html.unescape(found.group(1)))


ACTIONS = """
const rows = () => [...document.querySelectorAll("#table tbody tr.row")].map((row) => row.innerText.replace(/\\s+/g, " "));
const type = (id, text) => { const box = document.getElementById(id); box.value = text; box.dispatchEvent(new Event("input")); };
const found = {};
found.title = document.getElementById("title").textContent;
found.advice = document.getElementById("advice-text").textContent;
found.promise = document.getElementById("promise").textContent;
found.wide = document.documentElement.scrollWidth <= innerWidth;
found.marks = document.querySelectorAll("#frontier .mark").length;
found.costs = [...document.querySelectorAll("#costs figure")].map((figure) => [figure.dataset.cost, figure.querySelectorAll(".mark").length]);
const lines = (id) => document.querySelectorAll(`#${id} [aria-label=line] path`).length;
found.sites = lines("sites");
found.curves = lines("curves");
found.cards = [...document.querySelectorAll("#tuning .number")].map((card) => card.textContent);
found.tuning = document.getElementById("tuning").innerText;
found.adoption = document.getElementById("adoption-text").textContent;
found.serving = [...document.querySelectorAll("#serving text")].map((text) => text.textContent);
found.servingText = document.getElementById("serving-text").textContent;
found.ticks = [...document.querySelectorAll("#costs svg")].map((svg) => [...svg.querySelectorAll('[aria-label="x-axis tick label"] text')].map((text) => text.textContent));
found.epsilons = [...document.querySelectorAll('#frontier [aria-label="x-axis tick label"] text')].map((text) => text.textContent);
found.names = [...document.querySelectorAll("svg[role=img], .chart > svg")].map((svg) => svg.getAttribute("aria-label"));
found.heads = [...document.querySelectorAll("#table thead button")].map((button) => button.textContent);
const drawn = () => document.querySelector("#frontier svg").getAttribute("viewBox").split(" ")[2];
found.onScreen = drawn();
dispatchEvent(new Event("beforeprint"));
found.onPaper = drawn();
dispatchEvent(new Event("afterprint"));
found.onScreenAgain = drawn();
found.rows = rows();
const click = (key) => document.querySelector(`#table button[data-key="${key}"]`).click();
click("money");
found.byMoney = [...document.querySelectorAll("#table tbody tr.row")].map((row) => row.id);
found.sortMark = document.querySelector("th[aria-sort=ascending]").innerText.trim();
click("money");
found.byMoneyDown = [...document.querySelectorAll("#table tbody tr.row")].map((row) => row.id);
type("search", "nf4 epsilon=1.96");
found.searched = rows();
type("search", "no such thing");
found.nothing = rows();
type("search", "");
document.getElementById("only-best").click();
found.best = rows().length;
document.getElementById("only-best").click();
document.querySelector("#table .open").click();
found.detail = document.querySelector("tr.detail").innerText;
const mark = document.querySelector("#frontier .mark");
mark.dispatchEvent(new PointerEvent("pointerenter"));
found.tip = document.getElementById("tip").innerText;
document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
found.tipAway = document.getElementById("tip").hidden;
mark.focus();
found.tipOfFocus = document.getElementById("tip").innerText;
found.markName = mark.getAttribute("aria-label");
mark.dispatchEvent(new MouseEvent("click", { bubbles: true }));
found.opened = document.getElementById("row-" + mark.dataset.id).nextElementSibling.className;
const axis = () => document.querySelector('#parallel [data-axis="acc"] .overlay');
const box = axis().getBoundingClientRect();
const drag = (kind, share, target = window) => target.dispatchEvent(new MouseEvent(kind, { clientX: box.left + 5, clientY: box.top + share * box.height, view: window, bubbles: true }));
drag("mousedown", 0.02, axis()); drag("mousemove", 0.2); drag("mousemove", 0.35); drag("mouseup", 0.35);
found.filtered = document.getElementById("filtered").textContent;
found.marksLeft = document.querySelectorAll("#frontier .mark").length;
found.rowsLeft = rows().length;
found.brushed = document.querySelector('#parallel [data-axis="acc"] .selection').getBoundingClientRect().height / box.height;
await new Promise((then) => setTimeout(then)); // D3 swallows a click in the same moment as the end of a drag
document.getElementById("reset").click();
found.marksAgain = document.querySelectorAll("#frontier .mark").length;
type("want-money", "1000");
found.adoptionRich = document.getElementById("adoption-text").textContent;
type("want-accuracy", "99.9");
found.adoptionGood = document.getElementById("adoption-text").textContent;
return found;
"""


@pytest.fixture(scope="module")
def seen(made: Report) -> Any:
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    return in_browser(made.page, ACTIONS)


def test_no_errors_on_the_console(seen: Any) -> None:
    assert seen["errors"] == []


def test_everything_is_drawn(seen: Any, made: Report) -> None:
    value, data = seen["value"], numbers(made.page)
    assert value["title"].endswith("opinions, 2 labels")
    assert value["advice"] == data["groups"][0]["advice"] and value["promise"] == data["groups"][0]["promise"]
    assert value["marks"] == 12 and value["sites"] == 4 and len(value["rows"]) == 12
    assert dict(value["costs"])["money"] == 12 and len(value["costs"]) >= 5
    assert value["curves"] >= 4
    assert value["wide"], "the page does not scroll sideways"


def test_the_three_epsilons_are_shown(seen: Any, made: Report) -> None:
    tuning = numbers(made.page)["groups"][0]["tuning"]
    alone, composed, best_of = seen["value"]["cards"]
    assert float(alone.split()[1]) == pytest.approx(tuning["alone"], rel=1e-2)
    assert float(composed.split()[1]) == pytest.approx(tuning["composed"], rel=1e-2)
    assert best_of == "–" and "not the whole truth" in seen["value"]["tuning"]


def test_marks_are_reached_and_read_without_a_mouse(seen: Any) -> None:
    value = seen["value"]
    assert value["tipAway"] and value["tipOfFocus"] == value["tip"]
    assert "accuracy" in value["markName"]
    assert all(value["names"]) and len(value["names"]) >= 9, "each chart has a name"


def test_every_epsilon_has_its_number(seen: Any) -> None:
    assert seen["value"]["epsilons"] == ["0.416", "1.96", "7.13", "no privacy"]


def test_sorting(seen: Any, made: Report) -> None:
    value = seen["value"]
    amounts = {f"row-{p['id']}": p["cost"]["money"][0] for p in numbers(made.page)["points"]}
    assert value["byMoney"] == sorted(amounts, key=lambda row: amounts[row])
    assert value["byMoneyDown"] == value["byMoney"][::-1]
    assert value["sortMark"].startswith("money")


def test_filtering(seen: Any) -> None:
    value = seen["value"]
    assert len(value["searched"]) == 1 and "nf4" in value["searched"][0] and "1.96" in value["searched"][0]
    assert value["nothing"] == []
    assert 3 <= value["best"] < 12
    assert 0 < value["marksLeft"] == value["rowsLeft"] < 12 == value["marksAgain"]
    assert 0.2 < value["brushed"] < 0.4, "the filter stays where it was dragged"
    assert value["filtered"] == f"{value['marksLeft']} of 12 configurations pass the filters."


def test_a_row_opens_its_configuration_and_command(seen: Any) -> None:
    detail = seen["value"]["detail"]
    assert "fedtune run -m" in detail and "seed=0,1" in detail
    assert "privacy.max_grad_norm=1" in detail and "train.learning_rate=" in detail
    assert seen["value"]["opened"] == "detail", "a mark opens its row"
    assert "accuracy" in seen["value"]["tip"] and (
        "delta" in seen["value"]["tip"] or "no privacy" in seen["value"]["tip"]
    )


def test_adoption_on_the_page_is_what_python_counts(seen: Any, made: Report) -> None:
    start, value = numbers(made.page)["groups"][0]["adoption"], seen["value"]
    today, cheaper = start["by_price"][0], start["by_price"][4]
    text = value["adoption"]
    assert f"; {today} of them cost no more than " in text and "at epsilon" in text
    assert f"fall by 70 percent, {cheaper} do." in text
    good = int(text.split()[0])
    assert good == start["good_enough"]
    assert (
        value["adoptionRich"].startswith(f"{good} of ") and f"; {good} of them cost" in value["adoptionRich"]
    )
    assert value["adoptionGood"].startswith("0 of ")


def test_measured_models_are_on_the_page_with_what_they_make_affordable(seen: Any, made: Report) -> None:
    serving, value = numbers(made.page)["serving"], seen["value"]
    assert value["servingText"] == serving["text"] and "book 'serving'" in serving["text"]
    counts = [str(count) for one in serving["variants"] for count in one["affordable"]]
    texts = value["serving"]
    for name in ("smaller/original", "smaller/1 distill", "smaller/int8", "today", "−70 %"):
        assert name in texts
    assert [text for text in texts if text.isdigit()] == counts and len(set(counts)) > 1
    assert any(text.startswith("79.0 %, ") for text in texts)


def test_numbers_on_an_axis_differ(seen: Any) -> None:
    assert len(seen["value"]["ticks"]) >= 5
    for texts in seen["value"]["ticks"]:
        assert texts and len(set(texts)) == len(texts), texts


def test_the_table_begins_with_epsilon_and_accuracy(seen: Any) -> None:
    assert seen["value"]["heads"][:3] == ["epsilon", "accuracy", "quantization"]


def test_on_paper_charts_are_drawn_for_a_sheet(seen: Any) -> None:
    value = seen["value"]
    assert value["onPaper"] == "690" != value["onScreen"] == value["onScreenAgain"]


@pytest.mark.slow
def test_it_fits_a_phone(made: Report) -> None:
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    script = "return [document.documentElement.scrollWidth, innerWidth, document.querySelector('#frontier svg').getBoundingClientRect().width, document.querySelector('#frontier svg').textContent]"
    seen = in_browser(made.page, script, width=500)
    wide, window, chart, text = seen["value"]
    assert seen["errors"] == [] and wide <= window and chart <= window
    assert "none" in text, "the place without privacy has its name, however narrow the page is"


def test_missing_price_of_one_run(tmp_path: Path) -> None:
    import dataclasses

    write(tmp_path / "0", make_record())
    write(tmp_path / "1", make_record(seed=1, pricing=dataclasses.replace(PRICING, device_hour=-1.0)))
    made = write_report([tmp_path])
    assert "money" not in numbers(made.page)["points"][0]["cost"]


@pytest.mark.slow
def test_a_thousand_configurations_stay_light(tmp_path: Path) -> None:
    """What makes a page scroll smoothly: few elements, however many points."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    rates = [1e-4 * i for i in range(1, 68)]
    axes = {"epsilon": [0.5, 1.0, 2.0, 4.0, 8.0], "quantization": ["none", "int8", "nf4"]}
    assert write_grid(tmp_path, seeds=1, **axes, train__learning_rate=rates) == 1005
    script = (
        "return [document.querySelectorAll('*').length, document.querySelectorAll('#table tr.row').length]"
    )
    seen = in_browser(write_report([tmp_path]).page, script)
    elements, rows = seen["value"]
    assert seen["errors"] == [] and rows == 200 and elements < 10_000
