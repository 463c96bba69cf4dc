"""What a team exchanges: runs published, cells collected, pages, one leaderboard a project."""
