"""What is written and read: adapters, PEFT's layout of them, exported programs."""
