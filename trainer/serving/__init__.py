"""An HTTP server around the recommender: it follows the champion, batches requests and can be monitored."""
