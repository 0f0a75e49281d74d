"""Every node that reads each weight, and what is known of the way from the weight to it."""
