"""What a run costs: measured (`meter`) and priced (`prices`). Nothing here changes what a run does."""
