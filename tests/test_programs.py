"""The named endpoints, as programs use them: gradio_client, and MCP where its package is installed."""

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import warm
from browsing import NEEDS_MODEL

pytestmark = NEEDS_MODEL
PROMPT = "Write a story about a fox."
TEXT = "Once there was a fox who lived by the river and counted the boats. " * 6


@pytest.fixture(scope="module")
def client(url):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(url, verbose=False)


def test_generate_gives_text_and_figures_and_a_seed_repeats_them(client):
    first, again = (
        client.predict(PROMPT, 0.5, max_new_tokens=12, temperature=0.7, seed=5, api_name="/generate") for _ in range(2)
    )
    assert first["text"] == again["text"]
    assert first["new_tokens"] == 12
    assert 0 < first["load"] < 1
    assert 0 < first["kv_stored"] < first["kv_dense"]


def test_chat_answers_turn_by_turn_on_both_sides(client):
    found = client.predict([PROMPT, "And then?"], 0.5, max_new_tokens=8, api_name="/chat")
    assert found["sides"] == ["dense", "mod"]
    assert [turn["message"] for turn in found["turns"]] == [PROMPT, "And then?"]
    assert all(len(turn["answers"]) == len(turn["figures"]) == 2 for turn in found["turns"])
    assert found["turns"][1]["figures"][1]["prefilled"] < found["turns"][0]["figures"][1]["prefilled"]


def test_sweep_gives_a_point_a_threshold(client):
    found = client.predict(TEXT, [0.0, 0.5], api_name="/sweep")
    assert [point["p"] for point in found["points"]] == [0.0, 0.5]
    assert found["points"][1]["load"] < 1.0
    assert found["dense_loss"] > 0


def test_estimate_compares_dense_and_mod(client):
    found = client.predict("llama-2-7b", 8192, load=0.5, api_name="/estimate")
    assert found["mod"]["kv"] < found["dense"]["kv"]


@pytest.mark.parametrize(("endpoint", "arguments", "sentence"), [
    ("/generate", ("  ",), "prompt is empty"), ("/generate", (PROMPT, 1.5), "from 0 to 1"),
    ("/generate", (PROMPT, 0.5, "no/such-model"), "no/such-model"), ("/chat", ([],), "give at least one"),
    ("/sweep", ("short",), "at least 32"), ("/estimate", ("nonsense",), "neither a model folder"),
])
def test_bad_input_is_a_sentence(client, endpoint, arguments, sentence):
    with pytest.raises(Exception, match=sentence):
        client.predict(*arguments, api_name=endpoint)


@pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason='needs pip install "gradio[mcp]"')
def test_mcp_offers_the_same_four_as_tools(tmp_path):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client
    async def ask(address):
        async with (
            streamablehttp_client(f"{address}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool.description for tool in (await session.list_tools()).tools}
            made = await session.call_tool("estimate", {"config": "llama-2-7b"})
            return tools, made.content[0].text

    # Apart: the browser driver of other tests has a loop in this thread.
    with warm.app("--mcp", "--converted", str(tmp_path)) as address, ThreadPoolExecutor(1) as apart:
        tools, text = apart.submit(asyncio.run, ask(address)).result()
    assert set(tools) == {"generate", "chat", "sweep", "estimate"}
    assert "Mixture-of-Depths" in tools["generate"]
    assert "prefill_flops" in text
