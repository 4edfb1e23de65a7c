"""The command line: ``rpcnb serve | call | functions | servers | demo``."""
