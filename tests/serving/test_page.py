"""The web page in a real browser, against a server that writes without a model."""

import contextlib
import re
import shutil
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from fake_engine import running, serving, until
from fake_server import VOCABULARY, Fake
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a chromium")

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


PATIENCE = 60  # seconds, on a machine that is busy with other tests
expect.set_options(timeout=1000 * PATIENCE)


class Served:
    """A fake server that runs until `stop`."""

    def __init__(self, fake: Fake):
        self.fake = fake
        with contextlib.ExitStack() as stack:
            self.url = stack.enter_context(running(fake))
            self.stop = stack.pop_all().close


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def served():
    served = Served(Fake())
    yield served
    served.stop()


@pytest.fixture
def visit(browser):
    """Opens the page of a server; a fault of its script fails the test."""
    contexts, faults = [], []

    def visit(served: Served | str, **settings) -> Page:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.goto(served if isinstance(served, str) else served.url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults


def send(page: Page, text: str, wait: bool = True):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        finished(page)


def finished(page: Page):
    expect(page.locator("#log[aria-busy=false]")).to_be_attached()
    expect(page.locator("#send")).to_be_visible()


def complete(page: Page, text: str, max_tokens: int = 12):
    page.get_by_label("Completion", exact=True).check()
    page.locator("#max_tokens").evaluate(f"field => field.value = {max_tokens}")
    send(page, text)


def reply(page: Page, i: int = -1):
    return page.locator("article.model").nth(i)


def tokens(page: Page):
    return page.locator(".token").all_text_contents()


def test_a_chat_streams_with_its_history_and_its_settings(served, visit):
    page = visit(served)
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value in [("Temperature", "0.7"), ("Top-k", "5"), ("Top-p", "0.9"), ("Seed", "3")]:
        page.get_by_label(re.compile(f"^{name}")).first.fill(value)
    send(page, "Tell me of the sea")
    expect(reply(page).locator(".token").first).to_be_visible()
    expect(reply(page).locator(".stats")).to_contain_text(
        re.compile(r"first token [\d.]+ m?s · .*tokens/s")
    )
    send(page, "And the snow?")
    body = served.fake.seen[-1]
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == reply(page, 0).locator(".text").text_content()
    sent = {name: body[name] for name in ("temperature", "top_k", "top_p", "seed")}
    assert sent == {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}
    assert "min_p" not in body and "presence_penalty" not in body
    # What a screen reader is told, politely.
    expect(page.locator("#spoken[aria-live=polite]")).to_contain_text(tokens(page)[-1].strip())


def test_stop_ends_the_stream_at_the_server_and_keeps_what_came(served, visit):
    page = visit(served)
    send(page, "forever", wait=False)
    expect(reply(page).locator(".token").nth(3)).to_be_visible()
    expect(page.locator("#meter")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    finished(page)
    assert len(tokens(page)) >= 4
    expect(reply(page).locator(".stats")).to_contain_text("stopped")
    until(lambda: served.fake.left, PATIENCE)
    expect(page.locator("#prompt")).to_be_focused()
    send(page, "forever", wait=False)
    expect(reply(page, 1).locator(".token").first).to_be_visible()
    page.keyboard.press("Escape")
    finished(page)


def test_regenerated_replies_and_edited_messages_stay_as_versions(served, visit):
    page = visit(served)
    send(page, "one")
    first = reply(page).locator(".text").text_content()
    reply(page).get_by_role("button", name="Regenerate").click()
    finished(page)
    second = reply(page).locator(".text").text_content()
    assert first != second
    expect(reply(page).locator(".versions")).to_contain_text("2 / 2")
    reply(page).get_by_role("button", name="Earlier version").click()
    assert reply(page).locator(".text").text_content() == first
    send(page, "two")
    page.locator("article.you").first.hover()
    page.locator("article.you").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the text").fill("three")
    page.keyboard.press("Enter")
    finished(page)
    assert [m["content"] for m in served.fake.seen[-1]["messages"]] == ["three"]
    expect(page.locator("article")).to_have_count(2)
    page.locator("article.you").get_by_role("button", name="Earlier version").click()
    expect(page.locator("article")).to_have_count(4)
    assert reply(page, 0).locator(".text").text_content() == first
    reply(page, 0).get_by_role("button", name="Edit").click()  # the model's words can be mended too
    page.get_by_label("Edit the text").fill("Mended.")
    page.get_by_role("button", name="Save").click()
    send(page, "four")
    assert served.fake.seen[-1]["messages"][1] == {"role": "assistant", "content": "Mended."}


def test_a_token_tells_its_probability_its_rank_and_its_alternatives(served, visit):
    page = visit(served)
    send(page, "one")
    page.locator(".token").nth(4).hover()
    card = page.locator("#card")
    expect(card).to_be_visible()
    page.evaluate("dispatchEvent(new Event('scroll'))")  # as the page does by itself
    expect(card).to_be_visible()
    shares = [float(share.strip("< %")) for share in card.locator(".share").all_text_contents()]
    assert len(shares) >= 8 and shares[:8] == sorted(shares[:8], reverse=True)
    drawn = card.locator(".drawn")
    expect(drawn.locator("code")).to_have_text(tokens(page)[4].replace(" ", "␣"))
    expect(card.locator("dl")).to_contain_text(drawn.locator(".share").text_content())
    order = card.locator("li").evaluate_all(
        "rows => rows.map(row => !!row.querySelector('.drawn'))"
    )
    expect(card.locator("dl")).to_contain_text(f"Rank{order.index(True) + 1}")
    card.hover()  # stays while one points at it
    page.wait_for_timeout(300)
    expect(card).to_be_visible()
    page.mouse.move(5, 300)
    expect(card).to_be_hidden()


def test_any_alternative_branches_from_there_by_its_exact_tokens(served, visit):
    page = visit(served)
    complete(page, "Once")
    before, ids = tokens(page), served.fake.seen[-1]
    assert ids["prompt"] == "Once" and len(before) == 12
    page.locator(".token").nth(5).hover()
    other = page.locator("#card li button:not(.drawn)").first
    name = other.locator("code").text_content().replace("␣", " ")
    other.click()
    finished(page)
    after = tokens(page)
    assert after[:5] == before[:5] and after[5] == name and after[6:] != before[6:]
    prompt = served.fake.seen[-1]["prompt"]
    assert prompt[:4] == [
        byte % 50 for byte in b"Once"
    ]  # the prompt's ids, as the server told them
    assert [VOCABULARY[id].decode() for id in prompt[4:]] == after[:6]
    # Both are kept: from the list, and from the token where they part.
    rows = page.get_by_role("navigation", name="Branches").get_by_role("button")
    expect(rows).to_have_count(2)
    expect(page.locator(".token.fork")).to_have_count(1)
    rows.first.click()
    assert tokens(page) == before
    page.locator(".token").nth(5).hover()
    page.locator("#card .written").click()
    assert tokens(page) == after and len(served.fake.seen) == 2
    page.get_by_role("button", name="Continue").click()
    finished(page)
    assert len(tokens(page)) == 18 + 12 and tokens(page)[:18] == after
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    assert tokens(page)[:6] == after[:6] and len(tokens(page)) == 18
    expect(rows).to_have_count(3)


def test_characters_of_several_tokens_appear_whole(served, visit):
    page = visit(served)
    complete(page, "accents")
    expect(page.locator(".sheet .text")).to_have_text("accents né 🙂")


def test_the_keyboard_alone_sends_inspects_and_branches(served, visit):
    page = visit(served)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the message field")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.locator("[name=mode]:checked").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#prompt").focus()
    page.keyboard.type("Once")
    page.keyboard.press("Enter")
    finished(page)
    before = tokens(page)
    for _ in range(30):
        if page.evaluate("document.activeElement.matches('.token')"):
            break
        page.keyboard.press("Shift+Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    here = page.locator(".token").nth(3)
    expect(here).to_be_focused()
    assert re.search(r", [\d.]+ %, rank \d+$", here.get_attribute("aria-label"))
    expect(page.locator("#card")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#card li button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(here).to_be_focused()
    page.keyboard.press("ArrowDown")
    if page.locator("#card li button").first.get_attribute("aria-current"):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    finished(page)
    assert tokens(page)[:3] == before[:3] and tokens(page)[3] != before[3]
    expect(page.locator(".token").nth(3)).to_be_focused()


def test_what_a_model_writes_stays_text(served, visit):
    page = visit(served)
    send(page, "markup <b>bold</b>")
    text = "<script>window.hacked=1</script><img src=x onerror=hacked=1>&amp;<b>"
    expect(reply(page).locator(".text")).to_have_text(text)
    expect(page.locator("article.you .text")).to_have_text("markup <b>bold</b>")
    page.locator(".token").first.hover()
    complete(page, "markup")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#log :is(script, img, b:not(.branches b))").count() == 0


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_a_phone_scrolls_in_one_direction_alone(served, visit, mode):
    page = visit(served, **PHONE)
    expect(page.locator("#settings")).to_be_hidden()
    if mode == "completion":
        complete(page, "Once upon " + "a-word-without-an-end" * 20)
    else:
        send(page, "x" * 300)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    page.locator(".token").nth(2).tap()
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.get_by_role("button", name="Settings", exact=True).tap()
    expect(page.locator("#settings")).to_be_visible()
    assert not page.evaluate(wide)
    page.get_by_role("button", name="Close the settings").tap()
    expect(page.locator("#settings")).to_be_hidden()
    for control in page.locator("button:visible").all():
        assert control.bounding_box()["height"] >= 24  # WCAG 2.2, 2.5.8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_anyone_out(served, visit, scheme):
    """Names of all controls, roles, landmarks, contrast of colours: https://github.com/dequelabs."""
    page = visit(served, color_scheme=scheme)
    faults = []

    def look():
        found = Axe().run(page).response["violations"]
        faults.extend((fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found)

    look()
    send(page, "one")
    reply(page).get_by_role("button", name="Regenerate").click()
    finished(page)
    page.locator(".token").nth(3).click()
    look()
    reply(page).get_by_role("button", name="Edit").click()
    complete(page, "Once")
    page.locator(".token").nth(3).hover()
    page.locator("#card button:not(.drawn)").first.click()
    finished(page)
    page.locator(".token").nth(5).hover()
    look()
    page.set_viewport_size({"width": 390, "height": 844})
    send(page, "busy", wait=False)
    expect(page.get_by_role("alert")).to_contain_text("busy")
    look()
    page.get_by_role("button", name="Settings", exact=True).click()
    look()
    assert not faults


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch_which_is_remembered(served, visit, scheme):
    page = visit(served, color_scheme=scheme)
    dark = """() => { const [r] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g);
      return r < 128; }"""
    assert page.evaluate(dark) == (scheme == "dark")
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(dark) == (scheme == "light")
    page.reload()
    assert page.evaluate(dark) == (scheme == "light")


def test_a_busy_server_says_when_to_try_again(served, visit):
    page = visit(served)
    send(page, "busy", wait=False)
    expect(page.get_by_role("alert")).to_contain_text("The server is busy")
    expect(page.locator("article.model")).to_have_count(0)
    page.get_by_role("button", name="Try again", exact=True).click()  # enabled after Retry-After
    finished(page)
    expect(page.locator("#notice")).to_be_hidden()
    assert len(tokens(page)) > 0


def test_a_server_that_asks_for_a_key_gets_it(served, visit):
    served.fake.key = "sesame"
    page = visit(served)
    expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
    page.locator("#notice").get_by_label("API key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_be_hidden()
    send(page, "one")
    assert len(tokens(page)) > 0


def test_wrong_settings_are_said_by_the_field_or_by_the_server(served, visit):
    page = visit(served)
    page.get_by_label("Top-p", exact=True).fill("7")
    send(page, "one", wait=False)
    expect(page.get_by_label("Top-p", exact=True)).to_be_focused()
    assert not served.fake.seen
    page.get_by_role("button", name="Reset the settings").click()
    page.get_by_label(re.compile("^Temperature")).first.fill("2")
    send(page, "one", wait=False)
    expect(page.get_by_role("alert")).to_contain_text("temperature=2.0 must be at most 1.9")


def test_a_broken_connection_keeps_what_came_and_comes_back(served, visit):
    page = visit(served)
    send(page, "hangup")
    expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")
    assert 1 <= len(tokens(page)) <= 5
    expect(reply(page).locator(".stats")).to_contain_text("broken off")
    served.stop()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


def test_a_model_without_a_chat_template_opens_in_completion_mode(visit):
    served = Served(Fake(chat=False))
    page = visit(served)
    expect(page.locator("[name=mode][value=completion]")).to_be_checked()
    expect(page.locator("[name=mode][value=chat]")).to_be_disabled()
    send(page, "Once")
    assert served.fake.seen[-1]["prompt"] == "Once"
    served.stop()


def test_a_new_chat_can_be_taken_back(served, visit):
    page = visit(served)
    send(page, "one")
    before = tokens(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Bring back the last one").click()
    assert tokens(page) == before


def test_the_server_itself_sends_what_the_page_reads(visit):
    with serving() as (address, engine):
        engine.says["hi\nassistant: "] = "Héllo <b>🙂"
        page = visit(address)
        send(page, "hi")
        expect(reply(page).locator(".text")).to_have_text("Héllo <b>🙂")
        page.locator(".token").first.hover()
        expect(page.locator("#card")).to_contain_text("60.7 %")
        complete(page, "Once")
        before = tokens(page)
        assert len(before) == 12
        page.locator(".token").nth(7).hover()
        page.locator("#card button", has_text=re.compile("A")).click()  # not an "a" that was drawn
        finished(page)
        assert tokens(page)[:8] == [*before[:7], "A"] and len(tokens(page)) == 20
        expect(page.get_by_role("navigation", name="Branches").get_by_role("button")).to_have_count(
            2
        )
        engine.pause = 0.05
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("button", name="Stop").click()
        finished(page)
        until(lambda: not engine.held, PATIENCE)


def test_every_token_has_room_of_its_own_where_a_font_would_join_letters(visit):
    with serving() as (address, engine):
        engine.says["Once"] = "ff fi ffl\n\n"
        page = visit(address)
        complete(page, "Once")
        boxes = [one.bounding_box()["width"] for one in page.locator(".token").all()]
        assert len(boxes) == 12 and min(boxes) > 2  # the end is one, too


def test_who_writes_before_the_models_are_known_is_answered(visit):
    with serving() as (address, engine):
        engine.says["hi\nassistant: "] = "Hello."
        page = visit(address)
        page.route("**/v1/models", lambda route: (time.sleep(0.5), route.continue_()))
        page.reload()
        send(page, "hi")
        expect(reply(page).locator(".text")).to_have_text("Hello.")
