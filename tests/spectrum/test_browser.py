"""Pages in a real browser: no errors, no requests, tables that sort and filter, themes, axe."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import dense
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needed = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
if BROWSER is None or needed:
    missing = needed if BROWSER else ["Debian's chromium (apt-get install chromium)", *needed]
    pytest.skip(f"no browser to look with: {', '.join(missing)}", allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LORA, RSLORA, DORA, MODEL = (dense.TINY / name for name in ("lora", "rslora", "dora", "model"))
HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def pages(tmp_path_factory, request):
    """Return the paths of pages of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = folder / "hostile"
    shutil.copytree(LORA, hostile)
    stored = load_file(hostile / "adapter_model.safetensors")
    renamed = {key.replace(".layers.0.mlp", f".{HOSTILE}.mlp"): v for key, v in stored.items()}
    save_file({key: np.ascontiguousarray(v) for key, v in renamed.items()},
              hostile / "adapter_model.safetensors")  # fmt: skip
    results = {
        "spectrum": lt.spectrum(LORA, base=MODEL, entries=True),
        "pair": lt.compare([LORA, RSLORA]),
        "shelf": lt.compare({"one": LORA, HOSTILE: RSLORA, "three": DORA}),
        "bases": lt.compare_bases(LORA, MODEL, MODEL),
        "hostile": lt.spectrum(hostile),
        "squeeze": lt.squeeze(LORA, rank=8),
        "choices": lt.squeeze_choices(LORA),
        "merge": lt.merge([LORA, RSLORA], rank=8),
        "to-lora": lt.to_lora(DORA, base=MODEL, rank=8),
        "repair": lt.repair(LORA, base=MODEL),
        "fuse": lt.fuse(MODEL, LORA, output=folder / "fused"),
    }
    results["deep"] = lt.spectrum(deep(folder / "deep"))
    results["extract"] = lt.extract(MODEL, folder / "fused", rank=8)
    for name, result in results.items():
        (folder / f"{name}.html").write_text(result.html(), encoding="utf-8")
    return folder


def deep(folder):
    """Write an adapter of twelve layers of various ranks, one of them not finite."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors, ranks = {}, {}
    for layer in range(12):
        rank = ranks[f"layers.{layer}.q"] = (2, 16, 8, 128)[layer % 4]
        prefix = f"base_model.model.layers.{layer}.q"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, 150)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((140, rank)).astype(np.float32)
    tensors["base_model.model.layers.3.q.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"]}
    config["rank_pattern"] = ranks
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def browser():
    """Return a running browser."""
    with sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def look(browser, pages):
    """Return a function that opens a page, and fails at the end where it complained or loaded."""
    heard, opened = [], []

    def open_page(name, width=1280, theme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, bypass_csp=False
        )
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: heard.append(f"request: {request.url}"))
        page.goto((pages / f"{name}.html").as_uri())
        requested = [text for text in heard if text.startswith("request: file:")]
        assert len(requested) == 1
        heard.clear()
        return page

    yield open_page
    for context in opened:
        context.close()
    assert heard == []


def column(page, title, table="All modules"):
    """Return the texts of a column of a table, of the rows that are seen."""
    return page.evaluate(
        """([title, table]) => {
          const box = [...document.querySelectorAll(".table")].find(
            (one) => one.querySelector("caption").textContent === table);
          const place = [...box.querySelectorAll("thead th")].findIndex(
            (head) => head.textContent === title);
          return [...box.querySelectorAll("tbody tr")].filter((row) => !row.hidden)
            .map((row) => row.cells[place].dataset.value ?? row.cells[place].textContent);
        }""",
        [title, table],
    )


def by_numbers(text):
    """Return a key that orders text by the numbers in it."""
    parts = re.split(r"(\d+)", text)
    return [int(part) if part.isdigit() else part for part in parts]


@pytest.mark.slow
def test_names_and_ranks_are_in_order_of_their_numbers_and_what_is_missing_is_last(look):
    page = look("deep")
    table = page.locator(".table", has=page.get_by_text("All modules", exact=True))
    for title, key in (("module", by_numbers), ("rank", int)):
        for turn in (False, True):
            table.get_by_role("button", name=title, exact=True).click()
            found = column(page, title)
            assert found == sorted(found, key=key, reverse=turn)
            assert len(found) == 12
    for _ in range(2):
        table.get_by_role("button", name="‖ΔW‖", exact=True).click()
        assert column(page, "‖ΔW‖")[-1] == "–"
    page = look("spectrum")
    ranks = page.locator(".table", has=page.get_by_text("Rank, size and error", exact=True))
    ranks.get_by_role("button", name="rank", exact=True).click()
    found = column(page, "rank", "Rank, size and error")
    assert found == sorted(found, key=int)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectrum", "hostile"])
def test_the_table_sorts_and_filters(look, name):
    page = look(name, width=375)
    table = page.locator(".table", has=page.get_by_text("All modules", exact=True))
    before = column(page, "‖ΔW‖")
    heading = table.locator("th", has_text="‖ΔW‖").first
    heading.get_by_role("button").click()
    values = [float(text) for text in column(page, "‖ΔW‖")]
    assert values == sorted(map(float, before))
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert [float(text) for text in column(page, "‖ΔW‖")] == values[::-1]
    assert heading.get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="module").click()
    names = column(page, "module")
    if name != "hostile":
        assert names == sorted(names, key=by_numbers)
    table.get_by_label("Show rows with").fill("Q_proj layers.1")
    assert column(page, "module") == ["model.layers.1.self_attn.q_proj"]
    assert table.get_by_role("status").inner_text() == "1 of 28"
    table.get_by_label("Show rows with").fill("")
    assert len(column(page, "module")) == 28


def test_hostile_names_are_shown_as_text(look):
    page = look("hostile")
    assert any(HOSTILE in name for name in column(page, "module"))
    assert page.locator("img").count() == 0
    assert HOSTILE in look("shelf").locator("main").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(375, "dark"), (1280, "light")])
def test_pages_fit_their_window_and_have_no_serious_violation(look, pages, width, theme):
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
    for file in sorted(pages.glob("*.html")):
        page = look(file.stem, width, theme)
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, file.stem
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        serious = [
            (file.stem, violation["id"], node["html"][:200], node["failureSummary"])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]
        assert serious == []
        assert len(found["passes"]) > 10


def test_themes_differ_and_every_picture_has_its_numbers(look):
    paper = {
        theme: look("spectrum", theme=theme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for theme in ("light", "dark")
    }
    assert paper["light"] != paper["dark"]
    page = look("shelf")
    for figure in page.locator("figure").all():
        assert figure.locator("xpath=following-sibling::*[1][self::details or self::div]").count()


def test_a_notebook_shows_the_page_in_a_frame(browser, tmp_path):
    shown = f"<!doctype html><title>notebook</title>{lt.spectrum(LORA)._repr_html_()}"
    (tmp_path / "notebook.html").write_text(shown, encoding="utf-8")
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "notebook.html").as_uri())
    inside = page.frame_locator("iframe")
    assert inside.locator("h1").inner_text().startswith("Spectrum of ")
    inside.get_by_role("button", name="module").click()
    assert inside.locator("th[aria-sort=ascending]").count() == 1
    assert errors == []
    page.close()
