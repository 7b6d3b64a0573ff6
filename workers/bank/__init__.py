"""Where adapters' rows live on the device, and how they get there without stopping a step."""
