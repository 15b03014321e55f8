"""Reports as a browser reads them: well formed, escaped, whole in one file."""

import base64
import io
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread

from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import figures, html

NAN = float("nan")


class Reader(HTMLParser):
    """Collects what a browser would: text by element, attributes of every tag, and whether tags close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[str]:
        return [data for where, data in self.texts if where == tag]


def test_the_html_report_is_one_file_with_everything_in_it(tmp_path):
    figure = figures.training([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}])
    sections = [
        html.Section("Input & <output>", "First <b>paragraph</b>.\n\nSecond, of a\nfew lines."),
        html.Section("Numbers", table=[{"metric": "dice", "mean": 0.69}, {"metric": "<hd95>", "mean": NAN}]),
        html.Section('Cur"ves', figure=figures.png(figure, dpi=50)),
    ]
    html.report(tmp_path / "report.html", "A < B", sections)
    page = (tmp_path / "report.html").read_text("utf-8")
    reader = Reader(page)
    assert reader.open == []
    assert reader.all("title") == reader.all("h1") == ["A < B"]
    assert reader.all("h2") == ["Input & <output>", "Numbers", 'Cur"ves']
    assert reader.all("p") == ["First <b>paragraph</b>.", "Second, of a\nfew lines."]
    assert reader.all("th") == ["metric", "mean"]
    assert reader.all("td") == ["dice", "0.6900", "<hd95>", "–"]
    (source,) = (value for tag, name, value in reader.attributes if (tag, name) == ("img", "src"))
    assert source is not None and source.startswith("data:image/png;base64,")
    data = base64.b64decode(source.split(",")[1], validate=True)
    size = imread(io.BytesIO(data), format="png").shape[1::-1]
    assert size == tuple(int(inches * 50) for inches in figure.get_size_inches())
    assert [value for tag, name, value in reader.attributes if name == "alt"] == ['Cur"ves']
    outside = [value for _, name, value in reader.attributes if name in ("href", "src", "srcset", "action")]
    assert outside == [source] and "url(" not in page and "http" not in page.replace(source, "")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


class Unprintable:
    def __str__(self) -> str:
        raise RecursionError


def test_a_report_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "report.html"
    html.report(path, "old", [])
    with pytest.raises(RecursionError):
        html.report(path, "new", [html.Section("x"), html.Section("y", table=[{"column": Unprintable()}])])
    assert Reader(path.read_text("utf-8")).all("h1") == ["old"]
    html.report(path, "new", [])
    assert Reader(path.read_text("utf-8")).all("h1") == ["new"]
    with pytest.raises(BadInput, match="nowhere"):
        html.report(tmp_path / "nowhere" / "report.html", "x", [])
