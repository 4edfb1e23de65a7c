"""What a server does with requests: functions, handles, devices, files, compiled libraries. No sockets."""
