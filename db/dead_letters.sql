-- What a person does about events that were given up on. Each needs a reason, which the audit trail keeps.

create or replace function outbox.replay_dead_letter(p_id text, p_actor text, p_reason text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Makes the event due again at once, with a clean count; its handler asks before it sends. False, and nothing done, for
-- a
-- letter that is closed: replaying twice replays once.
declare
    v_now timestamptz := surety.time_now();
    v_letter outbox.dead_letters;
begin
    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'replayed', closed_by = p_actor, closed_because = p_reason
    where d.id = p_id and d.closed_at is null
    returning d.* into v_letter;
    if not found then
        return false;
    end if;
    insert into outbox.retries (handler, event_id, attempts, due_at)
    values (v_letter.handler, v_letter.event_id, v_letter.attempts, v_now)
    on conflict (handler, event_id) do nothing;
    insert into audit.entries (id, at, kind, actor, payment_id, outcome, reason, snapshot)
    values (
        surety.new_id('aud', v_now), v_now, 'operator', p_actor, v_letter.payment_id, 'replayed', p_reason,
        jsonb_build_object('dead_letter', v_letter.id, 'handler', v_letter.handler, 'event', v_letter.event_id));
    perform outbox.kick(array[v_letter.handler]);
    return true;
end;
$$;
