"""Keys of what fxlora writes into the meta of nodes."""

ADAPTER = "fxlora"  # of an adapter's last node: (name of A, form)
JOINED = "fxlora_joined"  # of one op for several adapted layers: the name of A of each
CHUNKED = "fxlora_chunked"  # of a loss: how it runs
INPUT = "fxlora_input"  # of one op for several adapted layers: the example of x, if it computes x
RECOMPUTED = "fxlora_recomputed"  # of a call that is computed again: what it saves
MERGED = "fxlora_merged"  # of a call that may form the adapted weight: the name of A
ONE_GRADIENT = "fxlora_one_gradient"  # of a call with a gradient of its first input only: the op
ROUTED = "fxlora_routed"  # of a node of a routed graph: the argument that it replaces, or None
APART = "fxlora_apart"  # of an adapter's last node that no such op computes: the reason
