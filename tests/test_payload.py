"""What a long run costs the page: bytes sent and browser work per token, for 2,000 tokens over 32 layers."""

import numpy as np
import pytest
from browsing import IN_A_BROWSER, wait_until

from app import ui
from app.headless import free_port
from app.service import Service, Update
from app.tape import Piece, Tape
from app.views import css
from modification.measure.cost import ModelShape
from modification.trace import Step

pytestmark = IN_A_BROWSER

TOKENS, LAYERS, A_FRAME = 2000, 32, 12
BYTES, MILLISECONDS = 1024, 2.0  # allowed per token, where the yardstick takes YARD or less
YARD = 650.0  # ms on two cores where a token takes 0.7 ms

# Text, figures and layout, as the live view has them: what the browser takes for it says how fast it is.
YARDSTICK = """() => {
    const box = document.createElement('div'), canvas = document.createElement('canvas');
    document.body.append(box, canvas);
    const context = canvas.getContext('2d');
    for (let at = 0; at < 200; at += 1) {
        for (const word of JSON.parse(JSON.stringify(Array(20).fill('word ' + at)))) {
            const made = document.createElement('span');
            made.textContent = word;
            box.append(made);
        }
        box.scrollTop = box.scrollHeight;
        for (let row = 0; row < 200; row += 1) {
            context.fillStyle = `rgba(${row}, 0, 0, 0.${row})`;
            context.fillRect(row, at % 100, 1, 1);
        }
    }
    box.remove();
    canvas.remove();
}"""


class LongRuns(Service):
    """Streams a random run of 32 layers, twelve tokens a frame, as fast as the page takes it."""

    def names(self):
        return ["random"]

    def run(self, session, p, request):
        noise = np.random.default_rng(0)
        shape = ModelShape(LAYERS, tuple(range(1, LAYERS - 1)), (1000,) * LAYERS, 1000, 64, 10)
        tape = Tape(shape, "A long run of random scores", 1)
        for at in range(TOKENS):
            scores = noise.random((LAYERS - 2, 1), dtype=np.float32)
            likely = tuple(int(token) for token in noise.integers(0, 32000, 5))
            step = Step(
                np.array([at]), np.array([-1.5], np.float32), scores, scores >= p, p, 10_000 * at, 11_000 * at,
                20_000 * at, 0.01, at == 0, (), likely, (-0.5, -1.0, -1.5, -2.0, -2.5),
            )
            tape.add(step, [Piece(f" word{at % 97}")], 0.01, [f" word{token % 97}" for token in likely])
            if at % A_FRAME == A_FRAME - 1:
                yield Update(tape=tape.text)
        tape.end("A long run.")
        yield Update(tape=tape.text)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    demo = ui.build(LongRuns({}, converted=tmp_path_factory.mktemp("converted")))
    port = free_port()
    demo.launch(server_port=port, prevent_thread_lock=True, quiet=True, css=css())
    yield f"http://127.0.0.1:{port}"
    demo.close()


def test_a_long_run_stays_light_and_loses_nothing(browser, address):
    """Under 1 KB sent and 2 ms of browser work a token, with every column drawn and the page still answering.

    The work is measured against a yardstick in the same page, so that a slow machine is not a failure.
    """
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.wait_for_selector("#generate")
    page.wait_for_timeout(1500)
    devtools, streams, sent = page.context.new_cdp_session(page), set(), []
    devtools.send("Network.enable")
    devtools.send("Performance.enable")
    devtools.on(
        "Network.requestWillBeSent",
        lambda event: "queue/data" in event["request"]["url"] and streams.add(event["requestId"]),
    )
    devtools.on(
        "Network.dataReceived", lambda event: event["requestId"] in streams and sent.append(event["dataLength"])
    )
    start = work(devtools)
    page.evaluate(YARDSTICK)
    before = work(devtools)
    slower = (before - start) / YARD
    page.click("#generate")
    wait_until(lambda: page.locator(".mod-canvas").get_attribute("data-columns") == str(TOKENS), 120)
    wait_until(lambda: "A long run." in page.locator("#status").inner_text())
    spent = (work(devtools) - before) / TOKENS
    print(f"{sum(sent) / TOKENS:.0f} bytes and {spent:.2f} ms of browser work per token; yardstick {slower:.2f}")
    assert sum(sent) / TOKENS < BYTES
    assert spent < MILLISECONDS * max(1.0, slower)
    page.locator(".mod-canvas").focus()
    page.keyboard.press("End")
    assert f"Token {TOKENS - 1}:" in page.locator(".mod-inspector h3").inner_text()
    page.close()


def work(devtools):
    """Milliseconds that the page's main thread has been at work."""
    metrics = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    return 1000 * metrics["TaskDuration"]
