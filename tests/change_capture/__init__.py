"""Change data capture with the real Debezium: `python -m tests.change_capture --json`.

    reader      the engine with deploy/debezium.properties, in a process of its own, that writes down what it gets
    run         kills it under traffic, and compares what it wrote with the outbox

It needs Java, and uv, which installs Debezium (200 MB) for the reader alone.
"""
