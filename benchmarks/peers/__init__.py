"""One dense Llama, several engines: seconds of prefill and of each decoded token, on the same weights.

    python -m benchmarks.peers FOLDER --contexts 512,2048 --threads 2 --json peers.json

Run from the repository root. Engines: stock transformers (always), llama.cpp (through GGUF files written here), ONNX
Runtime GenAI (through its model builder), and this project's own (always): at p = 0, where every token runs as in the
dense model, and at the loads asked for, with routers scattered at random if FOLDER has none; if it holds a MoD model,
the others get the dense model inside it. Before anything is timed, an engine's logits are held against transformers'
in float32 on the same rounded weights, over a prompt and a few single tokens; if they are further apart than its type
allows, it is refused. Token ids are random and fed, never sampled, so that every engine does the same work. Rounds
alternate between the engines; ratios are taken within a round, so that a machine that slows down for a while slows all
of them. ``pip install -r benchmarks/requirements-peers.txt`` gets the engines.

Left as the engines have it: llama.cpp keeps keys and values in f16 (its flash attention would turn f32 ones into f16
at every step) and, below f32, rounds activations too; its cache and ONNX Runtime's are there before the clock starts.
"""
