"""Charts as people see them: their texts, none of which overlaps another or leaves the picture."""

import pytest
from matplotlib.text import Text


def seen_texts(figure):
    """[(text, box in pixels)] of every visible text."""
    figure.set_dpi(150)  # as it is saved: letters have whole pixels
    figure.canvas.draw()
    hidden = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


def clashes(figure):
    """Texts that leave the picture or touch another."""
    texts = seen_texts(figure)
    wide, high = figure.bbox.size
    outside = [text for text, box in texts if box.x0 < 0 or box.y0 < 0 or box.x1 > wide or box.y1 > high]
    pairs = [(a, b) for at, a in enumerate(texts) for b in texts[:at]]
    touching = [
        (a, b)
        for (a, one), (b, other) in pairs
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]
    return [*outside, *touching]


@pytest.fixture(scope="session")
def texts_of():
    """(module, draw) -> the texts of the figure that `draw` has the module save; none of them clash."""

    def look(module, draw):
        texts = []

        def keep(figure, path, title=None):
            assert not clashes(figure)
            texts.extend(text for text, _ in seen_texts(figure))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "save", keep)
            draw()
        return texts

    return look
