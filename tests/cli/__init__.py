"""The program from outside: options, messages, exit codes."""
