"""What measures, predicts and explains: doctor, planner, benchmarks, plots, inspect."""
