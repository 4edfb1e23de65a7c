"""rpcnb in IPython and Jupyter: magics, panels, progress, displays. Nothing else imports this room.

Lives here: the magics, models folded from facts and events, the bridge that applies them, the widget and its view
(``static/panel.js``), text and HTML for where no widget can be.

Who enters: ``%load_ext rpcnb``, and ``rpcnb.panel``; earlier rooms find the panels by name (``rpcnb.parts``).

Begin with ``extension.py`` (what is loaded), then ``magics.py``, then ``bridge.py`` (how a panel stays alive).
"""
