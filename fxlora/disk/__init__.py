"""Files that fxlora writes and reads: adapter folders, in PEFT's layout or its own, and exports."""
