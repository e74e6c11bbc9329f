"""The mount: translates between the kernel's requests and a `Library`; decides nothing."""
