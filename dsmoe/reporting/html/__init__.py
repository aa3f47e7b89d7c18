"""One self-contained HTML page of sections: text, figures, tables; nothing is loaded from elsewhere."""

from dsmoe.reporting.html.page import Figure as Figure
from dsmoe.reporting.html.page import Key as Key
from dsmoe.reporting.html.page import Section as Section
from dsmoe.reporting.html.page import Table as Table
from dsmoe.reporting.html.page import Text as Text
from dsmoe.reporting.html.page import page as page
