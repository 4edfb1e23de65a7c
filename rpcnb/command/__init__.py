"""The command line: ``rpcnb serve | call | functions | servers | devices | tracker | proxy | demo``.

Lives here: one parser per subcommand, waiting for the end, the demo board and its functions.

Who enters: a shell; the notebook for the demo board. It uses the public names and nothing that they hide.

Begin with ``main.py`` (the parser), then ``serve.py`` (a board's server).
"""
