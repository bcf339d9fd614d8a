"""Channel groups: which channels of a network stand or fall together, and which cannot be removed."""

from distiller.channel_groups.find import find_channel_groups
from distiller.channel_groups.groups import ChannelGroup, ChannelGroups, GroupMember, WorkShare

__all__ = ["ChannelGroup", "ChannelGroups", "GroupMember", "WorkShare", "find_channel_groups"]
