"""The client's API: sessions and the remote things they give, blocking and awaited, twins by name.

Lives here: opening, both sessions, their operations as flows (written once), remote functions, tensors, modules and
devices, submitted operations, transfers, remote cells seen from here.

Who enters: users, by ``rpcnb``'s public names; the farm, the command line and the notebook.

Begin with ``session.py`` (what users call), then ``operations.py`` (what it asks), then ``pending.py`` (submitted).
"""
