"""The parts from which `make_minilm_lora.py` makes customer messages."""

from __future__ import annotations

PRODUCTS = [
    "kettle", "desk lamp", "pair of boots", "backpack", "coffee grinder", "raincoat",
    "keyboard", "garden chair", "headphones", "frying pan", "notebook", "bicycle pump",
]  # fmt: skip
TEST_PRODUCTS = ["toaster", "umbrella", "monitor", "wool blanket"]
OPENERS = ["", "Hello, ", "Hi there, ", "Good morning, ", "Sorry to bother you, "]
CLOSERS = ["", " Thanks.", " Please answer soon.", " Can you help?", " Kind regards."]

# For each label: the templates to train on, and those kept for testing.
TEMPLATES: dict[str, tuple[list[str], list[str]]] = {
    "cancel": (
        [
            "please cancel my order for the {}.",
            "I no longer want the {} I ordered today.",
            "stop the order of the {} before it ships.",
            "I ordered the {} by mistake, call it off.",
            "kindly withdraw my request for the {}.",
            "there is no need for the {} any more, scrap the order.",
            "take the {} off my order, I will not buy it.",
            "could you void the order with the {} in it?",
        ],
        ["I changed my mind about the {}, do not send it.", "can you annul the {} purchase?"],
    ),
    "track": (
        [
            "where is the {} I ordered?",
            "has my {} been shipped yet?",
            "what day will the {} arrive?",
            "the tracking page for the {} shows nothing new.",
            "I have been waiting for the {} for a week, where is it?",
            "did the courier already pick up my {}?",
            "how long does delivery of the {} take?",
            "is the {} on its way to me?",
        ],
        ["how far away is my {} at the moment?", "when can I expect the {} at my door?"],
    ),
    "refund": (
        [
            "I sent the {} back and want my money returned.",
            "when will I be refunded for the {}?",
            "the refund for the {} has not reached my bank.",
            "you owe me the price of the {} I returned.",
            "please reimburse me for the {} that went back to you.",
            "my card was not credited for the returned {}.",
            "the money for the {} should be on my account by now.",
            "how long does repayment for a returned {} take?",
        ],
        ["I am still waiting to be paid back for the {}.", "give me my money back for the {}."],
    ),
    "damaged": (
        [
            "the {} arrived broken.",
            "there is a crack in the {} you sent.",
            "the {} was smashed inside the box.",
            "my {} has a torn part and cannot be used.",
            "the {} does not work and looks dented.",
            "a piece of the {} fell off when I unpacked it.",
            "you delivered a faulty {}.",
            "the {} reached me with a hole in it.",
        ],
        ["I opened the parcel and the {} was in pieces.", "the {} came scratched and bent."],
    ),
    "invoice": (
        [
            "I need an invoice for the {}.",
            "please mail me the bill of the {} for my accountant.",
            "the receipt for the {} is missing from the parcel.",
            "the invoice of the {} shows the wrong company name.",
            "could I get a copy of the bill for the {}?",
            "I need proof of purchase of the {} for my taxes.",
            "the amount on the bill for the {} is not right.",
            "send the tax document for the {} to our finance team.",
        ],
        ["my bookkeeper asks for paperwork on the {}.", "can I have a VAT receipt for the {}?"],
    ),
    "address": (
        [
            "please deliver the {} to my new address.",
            "I moved house, send the {} to the other street.",
            "the delivery address for the {} is wrong.",
            "change where the {} is shipped to.",
            "I gave you an old postcode for the {}.",
            "can the {} go to my work place instead of home?",
            "the street name on the {} parcel is misspelt, correct it.",
            "we have moved, so update the destination of the {}.",
        ],
        ["I typed the wrong house number for the {}.", "bring the {} to my office, not my home."],
    ),
    "account": (
        [
            "I cannot log in to see my {} order.",
            "I forgot my password and wanted to buy the {}.",
            "the site locks me out when I look for the {}.",
            "reset my login so that I can review the {}.",
            "my profile is blocked and I cannot order the {}.",
            "I do not get the code to sign in and pay for the {}.",
            "my email is not accepted when I log in to buy the {}.",
            "the page of the {} says that my session is not valid.",
        ],
        ["my sign-in fails when I open the {} page.", "the {} shop says my user name is unknown."],
    ),
    "stock": (
        [
            "will you have the {} in stock again?",
            "is the {} sold out for good?",
            "do you have the {} in another colour?",
            "how many of the {} are left in the shop?",
            "can I still buy the {} from you?",
            "the {} is shown as unavailable, when does it return?",
            "do you plan to offer the {} in a larger size?",
            "I would like to know if the {} is on the shelf.",
        ],
        ["is the {} available at the moment?", "when do new deliveries of the {} reach the shop?"],
    ),
}
