"""The public client API: sessions, and the remote functions, tensors, modules and objects they give."""
