"""One file a tab: a class (or ``build``) that lays it out and wires its handlers; ``programs`` is for programs."""
