"""The command line: arguments -> one call of app or engine -> out. It translates and never decides."""
