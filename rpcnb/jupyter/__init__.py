"""rpcnb in IPython and Jupyter: magics and displays. Nothing else imports this layer."""
