"""The report in a real browser, offline: filters, sorting, keyboard, phone width, dark scheme, print."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.reporting.report import write_report
from tests.report_folders import add_scores, scored_folder, training_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium or google-chrome is installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright (extra test) is not installed")

SHOWN = "#rows > li:not([hidden])"
CONTRAST = """
(selector) => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const seen = (e) => e.checkVisibility() && e.textContent.trim();
  return Array.from(document.querySelectorAll(selector)).filter(seen).map((element) => {
    const [a, b] = [rgb(getComputedStyle(element).color), behind(element)].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    for seed, (name, skill) in enumerate((("base", 0.4), ("dpo", 0.8), ("sft", 0.6))):
        run = training_run(root / "runs" / name) if name == "dpo" else None
        scored_folder(root / name, skill, run=run)
        add_scores(root / name, seed, missing=("00003-s0",) if name == "dpo" else ())
    write_report(root / "base", [root / "dpo", root / "sft"], root / "r.html", resamples=500)
    return root


@pytest.fixture(scope="module")
def scores(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables that the report was made from, by model."""
    return {
        name: pq.read_table(root / name / "scores.parquet").to_pylist() for name in ("base", "dpo", "sft")
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(root: Path, browser: Any) -> Iterator[Any]:
    """Open the report offline; at the end nothing was asked from a network and nothing was complained of."""
    trouble: list[str] = []
    contexts = []

    def opened(width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(offline=True, viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if is_remote(request.url) else None)
        page.goto((root / "r.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def is_remote(url: str) -> bool:
    return not url.startswith(("file:", "data:"))


def shown_ids(page: Any) -> list[str]:
    return [row.get_attribute("data-id") for row in page.locator(SHOWN).all()]


def focused(page: Any) -> dict[str, str]:
    return page.evaluate(
        "() => { const at = document.activeElement; return {id: at.id, cell: at.dataset.cell ?? '', "
        "row: at.closest('li')?.dataset.id ?? ''}; }"
    )


def test_words_kind_and_outcome_narrow_the_rows_to_exactly_those_expected(
    open_page: Any, scores: dict[str, list[dict[str, Any]]]
) -> None:
    page = open_page()
    base, dpo = ({row["id"]: row for row in scores[name]} for name in ("base", "dpo"))
    assert page.locator(SHOWN).count() == 48
    page.fill("#find", "RED  circle")
    expected = [key for key, row in base.items() if "red" in row["prompt"] and "circle" in row["prompt"]]
    assert shown_ids(page) == expected
    assert 0 < len(expected) < 48
    assert page.inner_text("#count") == f"{len(expected)} of 48 rows shown"
    page.click("#clear")
    assert page.locator(SHOWN).count() == 48

    page.select_option("#kind", "counting")
    assert shown_ids(page) == [key for key, row in base.items() if row["kind"] == "counting"]
    page.select_option("#outcome", "win")
    wins = [
        key
        for key, row in base.items()
        if row["kind"] == "counting" and dpo[key]["oracle"] and dpo[key]["oracle"] - row["oracle"] > 1e-6
    ]
    assert shown_ids(page) == wins

    page.select_option("#kind", "")
    page.select_option("#metric", label="Badness")
    page.select_option("#outcome", "loss")
    worse = [key for key, row in base.items() if dpo[key]["badness"] and dpo[key]["badness"] > row["badness"]]
    assert shown_ids(page) == worse  # lower is better: more is a loss
    assert "00003-s0" not in worse  # without a score it is neither
    page.select_option("#outcome", "tie")
    assert page.locator(SHOWN).count() == 0


def test_another_metric_changes_scores_frames_and_order(
    open_page: Any, scores: dict[str, list[dict[str, Any]]]
) -> None:
    page = open_page()
    page.select_option("#metric", label="PickScore")
    page.select_option("#model", label="sft")
    base, sft = ({row["id"]: row["pickscore"] for row in scores[name]} for name in ("base", "sft"))
    cell = page.locator("#row-00005-s0 .cell").nth(2)
    assert cell.locator(".score").text_content() == f"{sft['00005-s0']:.2f}"
    won = sft["00005-s0"] > base["00005-s0"]
    assert ("win" if won else "loss") in cell.get_attribute("class").split()
    page.select_option("#order", "1")
    assert shown_ids(page) == sorted(base, key=lambda key: base[key] - sft[key])
    page.select_option("#order", "-1")
    assert shown_ids(page) == sorted(base, key=lambda key: sft[key] - base[key])
    page.select_option("#order", "")
    assert shown_ids(page) == list(base)


def test_static_labels_equal_those_that_the_script_writes(open_page: Any) -> None:
    """Without scripts the page shows the primary metric as Python writes it; the script must agree."""
    texts = [
        [item.strip() for item in page.locator("#rows .score, #rows .chip").all_text_contents()]
        for page in (open_page(), open_page(java_script_enabled=False))
    ]
    page = open_page()
    page.select_option("#metric", label="PickScore")
    page.select_option("#metric", label="Utility")
    assert texts[0] == texts[1]
    written = [item.strip() for item in page.locator("#rows .score, #rows .chip").all_text_contents()]
    far = [(a, b) for a, b in zip(texts[1], written, strict=True) if a != b and not half_apart(a, b)]
    assert far == []


def half_apart(a: str, b: str) -> bool:
    """Python rounds an exact half to even, a browser up."""
    numbers = [float(re.sub(r"[^\d.-]", "", text.replace("−", "-")) or "nan") for text in (a, b)]
    return abs(numbers[0] - numbers[1]) < 0.11


def test_the_keyboard_reaches_everything(open_page: Any) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.locator(".skip").evaluate("e => e === document.activeElement")
    assert page.locator(".skip").bounding_box()["x"] >= 0  # it shows itself when it has the focus
    page.keyboard.press("Enter")
    reached = []
    for _ in range(400):
        page.keyboard.press("Tab")
        at = focused(page)
        reached.append(at)
        if at["cell"]:
            break
    order = [at["id"] for at in reached if at["id"]]
    assert order == ["find", "kind", "metric", "model", "outcome", "order", "clear"]
    assert (reached[-1]["row"], reached[-1]["cell"]) == ("00000-s0", "0")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    for key, row, cell in (
        ("ArrowRight", "00000-s0", "1"),
        ("ArrowDown", "00000-s1", "1"),
        ("ArrowUp", "00000-s0", "1"),
        ("ArrowLeft", "00000-s0", "0"),
        ("ArrowLeft", "00000-s0", "0"),
    ):
        page.keyboard.press(key)
        at = focused(page)
        assert (at["row"], at["cell"]) == (row, cell), key
    page.keyboard.press("Tab")
    assert focused(page)["cell"] == ""  # the images are one stop


def test_the_lightbox_opens_moves_and_closes_by_keys(
    open_page: Any, scores: dict[str, list[dict[str, Any]]]
) -> None:
    page = open_page()
    page.locator("#row-00002-s0 .zoom").nth(1).focus()
    page.keyboard.press("Enter")
    box = page.locator("#lightbox")
    assert box.is_visible()
    prompts = {row["id"]: row["prompt"] for row in scores["base"]}
    assert page.inner_text("#lightbox-title") == prompts["00002-s0"]
    assert box.locator("figcaption").all_inner_texts() == ["base", "dpo"]
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in box.locator("tbody tr").all_inner_texts()}
    pickscore = {name: next(r for r in scores[name] if r["id"] == "00002-s0")["pickscore"] for name in scores}
    assert rows["PickScore"][:2] == [f"{pickscore['base']:.2f}", f"{pickscore['dpo']:.2f}"]
    page.keyboard.press("ArrowRight")
    assert box.locator("figcaption").all_inner_texts() == ["base", "sft"]
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#lightbox-title") == prompts["00002-s1"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")  # 00003-s0 has no image of dpo: the next that has
    assert (
        box.locator("[data-part=where]")
        .inner_text()
        .endswith(str(next(row["seed"] for row in scores["base"] if row["id"] == "00003-s1")))
    )
    page.keyboard.press("Escape")
    assert not box.is_visible()
    assert (focused(page)["row"], focused(page)["cell"]) == ("00003-s1", "1")
    page.locator("#row-00000-s0 .zoom").first.click()
    assert box.locator("figcaption").all_inner_texts() == ["base"]
    box.get_by_role("button", name="Close").click()
    assert not box.is_visible()


def test_tables_sort_by_their_headings(open_page: Any) -> None:
    page = open_page()
    table = page.locator("#results table.sortable")
    head = table.locator("th").nth(1)

    def names() -> list[str]:
        return [text.split("\n")[0] for text in table.locator("tbody th").all_inner_texts()]

    def means() -> list[float]:
        return [
            float(cell.get_attribute("data-value")) for cell in table.locator("tbody td:nth-child(2)").all()
        ]

    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert means() == sorted(means(), reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert means() == sorted(means())
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") is None
    assert names() == ["base", "dpo", "sft"]


def test_a_link_from_best_and_worst_leads_to_its_row_even_when_filtered_away(open_page: Any) -> None:
    page = open_page()
    page.fill("#find", "nothing has these words")
    assert page.locator(SHOWN).count() == 0
    link = page.locator("#extremes a").first
    target = link.get_attribute("href").removeprefix("#")
    images = page.locator("#extremes details[open] img")
    assert images.count() > 0
    assert all(image.evaluate("e => e.complete && e.naturalWidth > 0") for image in images.all()[:4])
    link.click()
    page.wait_for_function("id => !document.getElementById(id).hidden", arg=target)
    assert page.locator(f"#{target}").is_visible()


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_the_page_is_never_wider_than_the_window(open_page: Any, width: int) -> None:
    page = open_page(width)
    for part in page.locator("details").all():
        part.evaluate("e => { e.open = true; }")
    page.add_style_tag(content=".rows > li { content-visibility: visible !important; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#row-00000-s0 .zoom").nth(1).focus()
    page.keyboard.press("Enter")
    box = page.locator("#lightbox").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(open_page: Any, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    seen = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", seen)[:3])) < 150
    assert dark == (scheme == "dark")
    texts = "p, td b, td small, th, dd, dt, a, pre, .up, .down, .flat, .chip, .bar span, small, label, button"
    for selector in ("p", "td b", "a", ".up", ".chip.win", ".chip.loss", ".bar span", "pre", texts):
        ratios = page.evaluate(CONTRAST, selector)
        assert ratios, selector
        assert min(ratios) >= 4.5, (selector, min(ratios))


def test_print_shows_everything_on_white(open_page: Any, tmp_path: Path) -> None:
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".controls").is_visible()
    assert min(page.evaluate(CONTRAST, "p, td b, td small, th, .up, .down")) >= 4.5
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    page.pdf(path=tmp_path / "r.pdf")
    assert (tmp_path / "r.pdf").read_bytes().count(b"/Type /Page\n") > 3


def test_ids_with_quotes_tags_and_line_ends_do_not_stop_the_page(tmp_path: Path, browser: Any) -> None:
    """As in folders of images, whose names are the ids."""
    odd = [f"{k}\"'<script>alert(1)</script>&%\r\n]" for k in range(20)]
    for name, skill in (("base", 0.4), ("dpo", 0.8)):
        scored_folder(tmp_path / name, skill)
        file = tmp_path / name / "scores.parquet"
        table = pq.read_table(file)
        ids = [odd[k] if k < len(odd) else old for k, old in enumerate(table["id"].to_pylist())]
        pq.write_table(table.set_column(table.column_names.index("id"), "id", pa.array(ids)), file)
    write_report(tmp_path / "base", [tmp_path / "dpo"], tmp_path / "r.html", resamples=200)
    trouble: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: trouble.append(dialog.message))
    page.goto((tmp_path / "r.html").as_uri())
    assert page.locator(SHOWN).count() > 20
    assert page.locator(".controls").first.is_visible()  # the script came to its end
    scores = [page.locator(f"{SHOWN} .score").nth(k).text_content() for k in range(40)]
    assert all(scores)
    for link in page.locator("a[href^='#row-']").all():
        assert page.locator(link.get_attribute("href").replace(".", "\\.")).count() == 1
    page.close()
    assert trouble == []
