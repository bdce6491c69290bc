"""From a node's reply to a partial: judged, decoded, admitted, lifted, merged."""
