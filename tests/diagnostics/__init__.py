"""doctor, plan, inspect, bench and plots."""
