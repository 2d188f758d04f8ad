"""One file a tab: ``build(service)`` lays it out and wires its handlers."""
