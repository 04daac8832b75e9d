"""Names of the simple baselines, by what a model predicts: in tables, in `gate.must_beat`, where they are computed."""

POPULARITY = "popularity"
ITEM_TO_ITEM = "item-to-item"
ITEM_TO_ITEM_DECAYED = "item-to-item, decayed"
ITEM_TO_ITEM_ALL_TRAINING = "item-to-item, all domains, training rows"
ITEM_TO_ITEM_ALL = "item-to-item, all domains"
ITEM_TO_ITEM_ALL_DECAYED = "item-to-item, all domains, decayed"
TRANSITIONS = "transitions"
FRIENDS = "friends' items"
PERSONAL_FREQUENCY = "personal frequency"
MARKOV_CHAIN = "Markov chain"
MOST_FREQUENT = "most frequent value"
REGRESSION = "items, logistic regression"
SHARES = "shares of all"
OWN_PAST = "the user's own past"
POPULARITY_AND_ITEMS = "popularity and item-to-item"
PREDICTED_POPULARITY = "predicted popularity"
CONTENT_NEIGHBOURS = "content kNN"
RIDGE = "ridge, features onto factors"

OF_ONE_DOMAIN = (POPULARITY, ITEM_TO_ITEM, ITEM_TO_ITEM_DECAYED, TRANSITIONS)
OF_ALL_DOMAINS = (ITEM_TO_ITEM_ALL_TRAINING, ITEM_TO_ITEM_ALL, ITEM_TO_ITEM_ALL_DECAYED)  # where there are others
OF_COLD_ITEMS = (PREDICTED_POPULARITY, CONTENT_NEIGHBOURS, RIDGE)  # where items are held out, and have features
OF_BASKETS = (POPULARITY, PERSONAL_FREQUENCY, MARKOV_CHAIN)
