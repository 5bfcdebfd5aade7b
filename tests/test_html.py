"""report/html.py and report/plots.py: one page that holds everything, and shows what others wrote as text."""

import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import reports

from docs.figures import make_figures
from report import html, plots
from report.results import NOTHING_DROPPED, as_ranges, from_ranges, pareto_front, write_json

ROOT = Path(__file__).parents[1]
MEGABYTE = 10**6
HOSTILE = "<script>alert(1)</script>\"'&\n\u202etxt.exe"


class Reader(HTMLParser):
    """The elements of a page with their attributes, the headings, and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def full():
    return html.page(reports.report())


@pytest.fixture(scope="module")
def plain():
    return html.page(reports.plain_run().to_json())


def headings(page):
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def plot_named(report, name):
    (plot,) = [plot for _, found in plots.sections(report) for plot in found if plot.name == name]
    return plot


def test_the_page_has_every_part_in_the_order_in_which_it_is_asked(full):
    assert headings(full) == [
        "Quality", "Layers", "Similarity of layers", "Tiles", "Time", "Attention alone", "Trade-off", "Tasks",
        "What the numbers do not show",
    ]  # fmt: skip
    assert full.index("<h1>") < full.index('id="run"') < full.index("<h2")


def test_the_page_has_every_statistic_of_quality(full, plain):
    """Those of --long_ppl as well; a statistic that one window has not is there as not given."""
    report = reports.report()
    quality, shown = report["quality"], dict(re.findall(r"<tr><td>(.+)</td><td>([^<]+)</td></tr>", full))
    values = {name: quality[name] for name in ("delta_log_ppl", "se_tokens", "se_windows", "correlation", "rms_dp")}
    values |= {f"kl_{name}": value for name, value in quality["kl"].items()}
    values |= {f"long_ppl {name}": value for name, value in report["long_ppl"].items()}
    assert {name: float(shown[name]) for name in values} == pytest.approx(values, rel=1e-5)
    assert "<tr><td>se_windows</td><td>not given</td></tr>" in plain


def test_what_was_not_measured_has_no_part(plain):
    assert headings(plain) == ["Quality", "Layers", "Time", "Attention alone", "What the numbers do not show"]
    assert "Decoding was not measured" in plain


def test_the_page_asks_for_nothing_and_runs_nothing(full):
    found = Reader(full)
    assert not [tag for tag, _ in found.elements if tag in ("script", "iframe", "object", "embed", "audio", "video")]
    addresses = [
        value
        for _, attributes in found.elements
        for name, value in attributes.items()
        if name in ("href", "src", "xlink:href")
    ]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.findall(r"@import|url\((?!#)", full)
    assert len(full) < 1.5 * MEGABYTE


def test_every_plot_has_a_caption_with_its_n_and_its_numbers_as_a_table(full):
    figures = re.findall(r"<figure.*?</figure>", full, re.DOTALL)
    assert len(figures) == 13
    for figure in figures:
        caption = re.search(r"<figcaption>(.*?)<details", figure, re.DOTALL)[1]
        assert len(caption) > 80
        assert re.search(r"<svg viewBox=[^>]* role=\"img\" aria-label=\"[^\"]+\"", figure)
        assert figure.count("<tr>") >= 2
        assert re.search(r"\bn\s=\s|mean of all|window|%", caption)


def test_ids_are_unique_and_everything_referred_to_is_there(full):
    elements = Reader(full).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", full)) <= set(ids)


def test_plots_take_the_pages_own_black_and_white(full):
    svg = "".join(re.findall(r"<svg.*?</svg>", full, re.DOTALL))
    assert "currentColor" in svg and "var(--faint)" in svg
    assert not re.findall(r"#0{6}|#f{6}|#000\b|#fff\b|(?:fill|stroke): (?:black|white)", svg, re.IGNORECASE)


def test_what_others_wrote_is_shown_as_text():
    results = reports.results()
    settings = reports.replaced(results.settings, text=Path(f"/tmp/{HOSTILE}"))
    texts = {name: reports.replaced(text, name=HOSTILE) for name, text in results.texts.items()}
    report = results.to_json() | {"command": ["--text", HOSTILE]}
    report["tasks"][0]["task"] = HOSTILE
    report["model"]["name"] = HOSTILE
    report["texts"] = {name: vars(text) for name, text in texts.items()}
    report["config"]["text"] = str(settings.text)
    report["schedule"][3]["reason"] = HOSTILE
    page = html.page(report)
    found = Reader(page)
    assert "script" not in {tag for tag, _ in found.elements}
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert "\u202e" not in page, "what follows it would be read backwards"
    for where in ("<title>", "<dd>", "<pre>", "<td>", "<text"):
        assert re.search(rf"{where}[^\n]*&lt;script", page) or re.search(
            rf"{where}[^<]*(<bdi>)?[^<]*&lt;script", page
        ), where
    assert found.text.count("<script>alert(1)</script>") >= 5
    assert "\\u202etxt.exe" in found.text


def test_the_first_sentence_says_what_is_kept_lost_and_gained():
    report = reports.report()
    sentence = html.headline(report)
    assert re.fullmatch(
        r"Keeping 36 % of the attention costs this model \+\d\.\d ± \d\.\d % perplexity on this text; "
        r"it reads 2,048 tokens 1\.32x as fast and decodes 2\.53x as fast after 8,192 on this CPU\.",
        sentence,
    )
    report = reports.plain_run().to_json()
    assert html.headline(report).endswith("it reads 512 tokens 1.08x as fast on this CPU.")
    report["timing"]["sparse_ms"][0] = 411.0
    assert html.headline(report).endswith("it reads 512 tokens 1.08x as fast (within the noise) on this CPU.")
    report["quality"]["verdict"] = NOTHING_DROPPED
    assert html.headline(report).startswith("Nothing was dropped")


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        ("success", "under 2 %, by more"),
        ("failed", "above 2 %"),
        ("undecided", "4 windows cannot tell"),
        (NOTHING_DROPPED, "Lower --top_k"),
    ],
)
def test_the_second_sentence_says_how_sure_that_is(verdict, text):
    report = reports.report()
    report["quality"]["verdict"] = verdict
    assert text in html.verdict(report)


def test_a_perplexity_beyond_numbers_still_makes_a_page():
    report = reports.plain_run().to_json()
    report["quality"] |= {"degradation_pct": float("inf"), "sparse_perplexity": float("inf")}
    report["sparse"]["perplexity"] = float("inf")
    assert "beyond what a number can hold" in html.page(report)


def test_the_tile_map_marks_own_sink_chosen_and_dropped_tiles():
    report = reports.report()
    plot = plots.tile_map(report, report["tile_maps"][1])
    assert "reuses the tiles of layer 1" in plot.caption
    assert plot.rows[0] == ["0", "100.0 %", "0"]
    assert plot.rows[31] == ["31", f"{100 * report['tile_maps'][1]['mass_kept'][31]:.1f} %", "0 6 12 18 24 31"]


@pytest.mark.parametrize("numbers", [[], [0], [0, 3, 4, 5, 12], [7, 8]])
def test_ranges_are_read_as_they_were_written(numbers):
    assert from_ranges(as_ranges(numbers)) == numbers
    assert as_ranges([0, 3, 4, 5, 12]) == "0 3-5 12"


def test_the_pareto_front_leaves_out_what_another_beats_in_both():
    assert pareto_front([0.1, 0.2, 0.3, 0.25], [9, 4, 2, 5]) == [0, 1, 2]
    assert pareto_front([1, 1], [3, 2]) == [1]


def test_a_long_command_is_broken_between_its_words_alone():
    page = html.page(reports.report() | {"command": ["--text", "a b'c", "--html", "x.html"]})
    words = re.search(r"<pre>(.*?)</pre>", page)[1]
    assert re.sub("<.*?>", "", words) == (
        "python benchmark_kascade_final.py --text &#39;a b&#39;&#34;&#39;&#34;&#39;c&#39; --html x.html"
    )
    assert words.count("<span>") == 6


def test_both_set_ups_of_a_task_have_a_row_each_with_all_three_arms():
    plot = plots.tasks(reports.report())
    assert [row[0] for row in plot.rows] == [
        "niah_single (prompt)",
        "niah_single (question)",
        "vt (prompt)",
        "vt (question)",
    ]
    assert plot.columns[2:5] == ("dense", "oracle", "sparse")
    assert plot.rows[0][2].startswith("95 % [") and plot.rows[0][4].startswith("75 % [")
    assert "2 of these 4 rows can tell. n = 40 questions, prompts of 1,900 tokens" in plot.caption


def test_every_timed_run_is_a_point():
    """A marker each in the plot by depth: 2 runs of 3 arms at 3 depths, and 3 in the legend."""
    report = reports.report()
    plot = plot_named(report, "depths")
    assert plot.svg.count("<use ") == 2 * 3 * 3 + 3 + (3 + 5)  # the last are ticks


@pytest.mark.parametrize(
    ("between", "sentence"),
    [
        ((512, 2048), "begins to be faster between 512 and 2,048 tokens (the band)"),
        ((None, 512), "is faster at every depth, from 512 tokens on"),
        ((8192, None), "is not faster even at 8,192 tokens"),
    ],
)
def test_the_caption_says_where_sparse_begins_to_be_faster(between, sentence):
    report = reports.report() | {"decode_break_even": between}
    plot = plot_named(report, "depths")
    assert sentence in plot.caption
    assert ("break-even" in plot.svg) == (None not in between)


def test_lengths_whose_labels_would_touch_have_none():
    assert plots.apart_enough(np.array([512, 2048, 8192])) == [512, 2048, 8192]
    assert plots.apart_enough(np.array([512, 513, 600, 8192])) == [600, 8192]
    assert plots.apart_enough(np.array([64])) == [64]


def test_a_loss_far_beyond_the_others_does_not_flatten_them():
    report = reports.report()
    assert "logarithmic" not in plots.trade_off(report).caption
    for row, loss in zip(report["densities"], (177.4, 65.1, -0.2, None), strict=True):
        row["degradation_pct"] = loss
    plot = plots.trade_off(report)
    assert "logarithmic beyond ±2 %" in plot.caption and "(n = 4)" in plot.caption
    assert [row[0] for row in plot.rows] == ["10 %", "20 %", "30 %", "this run"], (
        "the fourth was beyond what a number can hold"
    )
    ticks, labels = plots.steps_of([177.4, 65.1, -0.2])
    assert ticks == sorted(ticks) and 0 in ticks and max(ticks) == 100 and len(labels) <= 6


def test_points_whose_names_would_touch_have_none_in_the_plot_and_all_have_a_row():
    report = reports.report()
    crowd = [report["densities"][0] | {"asked": asked, "density": asked} for asked in (0.1, 0.101, 0.102)]
    report["densities"] = [*crowd, *report["densities"][1:]]
    plot = plots.trade_off(report)
    assert [row[0] for row in plot.rows] == ["10 %", "10.1 %", "10.2 %", "20 %", "30 %", "50 %", "this run"]
    assert "10.2 %" in plot.svg and "10.1 %" not in plot.svg


def test_times_of_very_different_lengths_are_on_a_logarithmic_axis():
    report = reports.report()
    assert ">0<" in plot_named(report, "sweep").svg
    report["sweep"][0] |= {"dense_ms": [1.0], "sparse_ms": [1.5]}
    assert ">0<" not in plot_named(report, "sweep").svg


def test_one_layer_alone_is_compared_with_none():
    report = reports.plain_run().to_json() | {"similarity": [[1.0]]}
    assert "Similarity of layers" not in [heading for heading, _ in plots.sections(report)]


def test_a_page_of_every_part_takes_less_than_three_seconds():
    """Of the processor's time, which other programs do not lengthen; most of it is matplotlib's."""
    report, start = reports.report(), time.process_time()
    html.page(report)
    assert time.process_time() - start < 3


# --- Figures of the docs ---


def test_the_docs_figures_are_the_pages_plots_on_a_card_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(make_figures, "FOLDER", tmp_path)
    write_json(tmp_path / "report.json", reports.report())
    assert make_figures.main([str(tmp_path / "report.json")]) == 0
    assert {path.name for path in tmp_path.glob("*.svg")} == {"kascade.svg", "trade-off.svg", "depths.svg"}
    for path in tmp_path.glob("*.svg"):
        drawing = ElementTree.parse(path)
        assert drawing.find("{http://www.w3.org/2000/svg}rect").get("fill") == make_figures.CARD
        assert not re.search("currentColor|var\\(", path.read_text())
    assert "Time of a decoded token by depth" in (tmp_path / "depths.svg").read_text()
    assert list(make_figures.draw(reports.plain_run().to_json())) == ["kascade.svg"]


def test_a_file_that_is_no_report_gives_no_figures(tmp_path, capsys):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        make_figures.main([str(tmp_path / "report.json")])
    assert "is no report of this program" in capsys.readouterr().err


def test_a_run_without_a_page_loads_neither_jinja2_nor_matplotlib():
    code = "import sys, benchmark_kascade_final; sys.exit(', '.join({'jinja2', 'matplotlib'} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# --- In a browser ---


@pytest.fixture(scope="module")
def browser():
    from browser import Browser

    opened = Browser()
    yield opened
    opened.close()


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["full", "plain", "hostile"])
def test_chromium_shows_a_page_without_complaint_request_or_overflow(browser, tmp_path, kind):
    report = reports.plain_run().to_json() if kind == "plain" else reports.report()
    if kind == "hostile":
        report["model"]["name"], report["command"] = "W" * 300 + HOSTILE, ["--text", "W" * 300]
    (tmp_path / "page.html").write_text(html.page(report), encoding="utf-8")
    for width in (400, 800, 1600):
        for scheme in ("light", "dark"):
            browser.open(tmp_path / "page.html", width, scheme)
            assert browser.too_wide() == []
            assert browser.unreadable() == []
            assert [url for url in browser.requested() if not url.startswith(("file:", "data:"))] == []
            assert len([url for url in browser.requested() if url.startswith("file:")]) == 1
            assert browser.complaints() == []
            paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
            ink = browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            assert ink == browser.evaluate("getComputedStyle(document.body).color"), "text of plots follows the page"


@pytest.mark.browser
def test_paper_has_few_pages_and_no_tables_that_are_long(browser, tmp_path):
    report = reports.report()
    (tmp_path / "page.html").write_text(html.page(report), encoding="utf-8")
    browser.open(tmp_path / "page.html", 800, "dark")
    paper = browser.printed()
    assert paper.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 9
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    folded = "[...document.querySelectorAll('details')].filter(details => !details.open && getComputedStyle(details).display == 'none')"
    assert browser.evaluate(f"{folded}.length") == 4, "all settings and statistics, and two maps of tiles"


@pytest.mark.browser
def test_texts_that_are_small_cut_or_over_one_another_are_seen(browser, tmp_path):
    svg = (
        "<svg viewBox='0 0 100 50' width=200><text x=10 y=20>one</text><text x=12 y=22>two</text>"
        "<text x=90 y=45>three</text><text x=10 y=48 font-size=2>four</text></svg>"
    )
    (tmp_path / "page.html").write_text(svg)
    browser.open(tmp_path / "page.html", 400)
    faults = " ".join(browser.unreadable())
    assert "two lies over one" in faults and "three is cut" in faults and "four is 4 pixels" in faults


@pytest.mark.browser
def test_an_element_that_is_too_wide_is_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text("<p style='width: 500px'>wide</p>")
    browser.open(tmp_path / "page.html", 400)
    assert browser.too_wide()


def test_a_notebooks_choice_of_a_backend_does_not_matter():
    command = [sys.executable, "-c", "import report.plots"]
    environment = os.environ | {"MPLBACKEND": "module://a_package_that_is_not_here.backend"}
    subprocess.run(command, env=environment, check=True)
