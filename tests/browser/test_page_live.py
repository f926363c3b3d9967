"""The page of a run in Chromium: what is clicked is what is shown, by mouse, finger, keyboard; it asks for nothing."""

from base64 import b64encode
from contextlib import contextmanager
from dataclasses import replace

import pytest
from tiny import pair

from minimtp import Sampling
from minimtp.display import FATES, visible
from minimtp.page import write_page
from minimtp.watch import watch

WIDTHS = {"desk": (1280, 900), "phone": (360, 740)}
BREAK = "document.title='broken'"
HOSTILE = f'<!--<script </script><script>{BREAK}</script><img src=x onerror="{BREAK}">' + 300 * "W"


@pytest.fixture(scope="module")
def run():
    target, drafter = pair("bundled")
    prompt = target.tokenizer.encode("ROMEO:\n")
    return watch(target, prompt, drafter, sampling=Sampling(0.9), max_new_tokens=48, seed=3)


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "run.html"
    write_page(path, run, "minimtp run")
    return path


@contextmanager
def opened(browser, path, width="desk", scheme="light", **more):
    """The page; what it complains of, or asks the network for, fails the test."""
    wide, high = WIDTHS[width]
    page = browser.new_page(viewport={"width": wide, "height": high}, color_scheme=scheme, **more)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert complaints == [] and requests == [path.as_uri()]
    page.close()


def panel_says(page, place):
    """Whether the panel shows this Place, all of it."""
    panel = page.locator("#panel")
    assert panel.locator(".name").text_content() == visible(place.label)
    assert panel.locator(".fate").text_content() == f"{FATES[place.fate].mark} {place.fate}"
    assert panel.locator(".says").text_content() == place.says
    where = panel.locator(".where").text_content()
    assert f"round {place.round}," in where and f"position {place.position} " in where
    assert where.endswith(f"id {place.token}")
    if place.depth:
        assert f"draft token {place.depth} of" in where
    numbers = dict(
        zip(panel.locator(".numbers dt").all_text_contents(), panel.locator(".numbers dd").all_text_contents())
    )
    wanted = {name: value for name, value in (("p", place.p), ("q", place.q), ("u", place.u)) if value is not None}
    assert {name: float(text) for name, text in numbers.items() if name != "p/q"} == pytest.approx(wanted, rel=0.01)
    assert ("p/q" in numbers) == (place.depth is not None)
    tables = panel.locator("table")
    assert tables.count() == 1 + bool(place.drawn_from)
    assert tables.first.locator("th").count() == len(place.bars) + 1
    if place.drawn_from:
        assert tables.last.locator("th").count() == len(place.drawn_from) + 1


def bars_are_in_proportion(page, place):
    for row, bar in zip(page.locator("#panel table").first.locator("tr").all(), place.bars):
        shares = [one.evaluate("node => parseFloat(node.style.width) / 100") for one in row.locator(".bar").all()]
        full = float(page.locator("#panel caption").first.text_content().rpartition(" ")[2])
        assert shares == pytest.approx([chance / full for chance in bar[1:] if chance is not None], abs=1e-4)
        assert max(shares) <= 1


def test_every_fate_is_shown_when_its_token_is_clicked(browser, file, run):
    with opened(browser, file) as page:
        panel_says(page, run.places[0])
        buttons = page.locator("button.token")
        assert buttons.count() == len(run.places)
        for fate in FATES:
            index = next(i for i, place in enumerate(run.places) if place.fate == fate)
            buttons.nth(index).click()
            panel_says(page, run.places[index])
            bars_are_in_proportion(page, run.places[index])
            assert page.locator("[aria-current]").count() == 1


def test_a_finger_does_what_a_mouse_does(browser, file, run):
    with opened(browser, file, "phone", has_touch=True) as page:
        page.locator("button.token").nth(4).tap()
        panel_says(page, run.places[4])


def test_arrow_keys_go_through_tokens_and_rounds(browser, file, run):
    with opened(browser, file) as page:
        page.locator("button.token").first.focus()
        firsts = [next(i for i, place in enumerate(run.places) if place.round == number) for number in range(3)]
        for key, index in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowDown", firsts[2]),
                           ("ArrowUp", firsts[1]), ("End", len(run.places) - 1), ("ArrowRight", len(run.places) - 1),
                           ("Home", 0), ("ArrowLeft", 0)]:  # fmt: skip
            page.keyboard.press(key)
            panel_says(page, run.places[index])
            focused = page.evaluate("document.activeElement.dataset.index")
            assert int(focused) == index
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px"


def test_arrow_keys_need_no_click_first(browser, file, run):
    with opened(browser, file) as page:
        page.keyboard.press("ArrowRight")
        panel_says(page, run.places[1])
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("ArrowDown")  # scrolls
        panel_says(page, run.places[1])


def test_what_was_not_kept_can_be_hidden(browser, file, run):
    with opened(browser, file) as page:
        page.locator("#ghosts").uncheck()
        shown = page.locator("button.token:visible").all_text_contents()
        assert "".join(shown).replace("\u23ce", "\n") == run.text
        page.locator("button.token:visible").first.focus()
        for place in [place for place in run.places if place.emitted][1:8]:
            page.keyboard.press("ArrowRight")
            panel_says(page, place)


def test_a_square_leads_to_its_token(browser, file, run):
    with opened(browser, file) as page:
        page.locator("#ghosts").uncheck()
        index = next(i for i, place in enumerate(run.places) if place.fate == "rejected")
        page.locator(".square").nth(index).click()
        panel_says(page, run.places[index])
        assert page.locator("button.token").nth(index).is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_runs_over_the_side_and_something_is_there(browser, file, run, width, scheme):
    with opened(browser, file, width, scheme) as page:
        for index in (0, 5, len(run.places) - 1):
            page.locator("button.token").nth(index).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width][0]
        ground, colours = drawn(page, page.screenshot())
        assert colours > 50 and (sum(ground) < 150) == (scheme == "dark")


def drawn(page, png):
    """(the most common colour, how many colours) of a picture, which the browser itself unpacks."""
    return page.evaluate(
        """async (base64) => {
        const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
        const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
        const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        const pixels = new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer), counts = {};
        for (const pixel of pixels) counts[pixel] = (counts[pixel] || 0) + 1;
        const most = Number(Object.entries(counts).sort((a, b) => b[1] - a[1])[0][0]);
        return [[most & 255, (most >> 8) & 255, (most >> 16) & 255], Object.keys(counts).length];
        }""",
        b64encode(png).decode(),
    )


def test_hostile_tokens_are_shown_as_text(browser, run, tmp_path):
    places = [replace(place, label=HOSTILE, text=HOSTILE) for place in run.places[:9]]
    path = tmp_path / "hostile.html"
    write_page(path, replace(run, places=places), HOSTILE)
    with opened(browser, path, "phone") as page:
        page.locator("button.token").nth(2).click()
        assert page.locator("#panel .name").text_content() == visible(HOSTILE)
        assert page.locator("button.token").nth(2).text_content() == HOSTILE
        assert page.title() != "broken" and page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_another_script_would_not_run(browser, file, tmp_path):
    path = tmp_path / "changed.html"
    path.write_text(
        file.read_text(encoding="utf-8").replace("</body>", "<script>document.title='broken'</script></body>")
    )
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.title() != "broken" and page.locator("#panel .name").count() == 1
    page.close()
