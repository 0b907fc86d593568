-- Facts: what a provider asserts about a payment, as an answer to a call, in a webhook, a poll or a bank's file.
--
-- A fact, as an object of the array that surety.record_facts takes:
--   {"payment_id"?, "provider", "account", "livemode", "object_id", "kind", "revision"?, "amount_minor"?, "currency"?,
--    "intent"?, "metadata_payment"?, "metadata_environment"?, "objects"?: [other ids of the payment], "data"?: {},
--    "source", "source_id"?, "occurred_at"?}
-- Amounts are minor units of currency. kind is a row of surety.fact_kinds.
--
-- data of a money fact: category (charge, refund, dispute, payout, …), source, fee, net, available_at, and for a
-- record in another currency than the payment: other_currency, other_gross, rate. amount_minor is the record's gross,
-- signed, and so is other_gross. A bank's facts about ACH have the provider bank and the categories ach_credit,
-- ach_return, refund and refund_failure. A bank line that was matched to a payout, bank_line, names the account that
-- paid out.

create or replace function surety.new_fact(
    p_id text, p_payment_id text, p_provider text, p_account text, p_livemode boolean, p_object_id text, p_kind text,
    p_source text, p_recorded_at timestamptz, p_revision integer default 0, p_amount_minor bigint default null,
    p_currency text default null, p_data jsonb default '{}', p_source_id text default null,
    p_occurred_at timestamptz default null
) returns surety.facts
language sql immutable parallel safe
begin atomic
    -- One expression and no set clause, so that PostgreSQL inlines it.
    select (
        p_id, p_payment_id, p_provider, p_account, p_livemode, p_object_id, p_kind, p_revision, p_amount_minor,
        p_currency, p_data, p_source, p_source_id, null, p_occurred_at, p_recorded_at
    )::surety.facts;
end;

comment on function surety.new_fact(
    text, text, text, text, boolean, text, text, text, timestamptz, integer, bigint, text, jsonb, text, timestamptz
) is
'A row of surety.facts by named arguments, neither disregarded nor stored. p_amount_minor is in minor units of
p_currency.';

create or replace function surety.match_fact(
    p_payment_id text, p_provider text, p_account text, p_object_id text, p_intent text, p_source_object text,
    p_metadata_payment text
) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(
        p_payment_id,
        (
            select o.payment_id
            from surety.provider_objects as o
            where (o.provider, o.account, o.object_id) = (p_provider, p_account, p_object_id)
        ),
        (
            select o.payment_id
            from surety.provider_objects as o
            where (o.provider, o.account, o.object_id) = (p_provider, p_account, p_intent)
        ),
        (
            select o.payment_id
            from surety.provider_objects as o
            where (o.provider, o.account, o.object_id) = (p_provider, p_account, p_source_object)
        ),
        (select p.id from surety.payments as p where p.id = p_metadata_payment)
    );
end;

comment on function surety.match_fact(text, text, text, text, text, text, text) is
'The id of the payment that a fact belongs to: the one it names, else that of its object, of its intent, of the object
that the money came from, or the payment that our metadata names. Null if none is known.';

create or replace function surety.objects_without_facts(p_objects jsonb) returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    select coalesce(array_agg(asked.object_id), '{}')
    from jsonb_to_recordset(p_objects) as asked (
        provider text, account text, livemode boolean, object_id text, kinds jsonb
    )
    where not exists (
        select from surety.fact_keys
        where
            asked.provider = fact_keys.provider and asked.account = fact_keys.account
            and asked.livemode = fact_keys.livemode and asked.object_id = fact_keys.object_id
            and asked.kinds ? fact_keys.kind
    );
end;

comment on function surety.objects_without_facts(jsonb) is
'The ids of the objects that have no fact of these kinds yet, from [{"provider", "account", "livemode", "object_id",
"kinds": []}]. The others need not be fetched when a webhook announces them again.';

create or replace function surety.next_fact_revision(p_provider text, p_account text, p_livemode boolean, p_object_id
text) returns integer
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(max(fact_keys.revision) + 1, 0) from surety.fact_keys
    where
        fact_keys.provider = p_provider and fact_keys.account = p_account and fact_keys.livemode = p_livemode
        and fact_keys.object_id = p_object_id;
end;

comment on function surety.next_fact_revision(text, text, boolean, text) is
'One more than the highest revision known of an object; 0 for a new one. The caller holds a lock that keeps others from
asking for the same object.';

create or replace function surety.next_fetch_number(p_provider text, p_account text, p_livemode boolean, p_object_id
text) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- Two workers may fetch the same dispute at once: an advisory lock ends with its connection. With equal numbers the
    -- last fetch would be unknown. A restored dump may have reset the sequence, so known revisions count too.
    select greatest(
        nextval('surety.fetch_numbers')::integer,
        surety.next_fact_revision(p_provider, p_account, p_livemode, p_object_id)
    );
end;

comment on function surety.next_fetch_number(text, text, boolean, text) is
'A number for a fetch of an object that begins now, higher than any before. Disputes need it: their last fetch wins.';

create or replace function surety.store_command_fact(p_fact surety.facts) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
    values (
        p_fact.provider, p_fact.account, p_fact.livemode, p_fact.object_id, p_fact.kind, p_fact.revision, p_fact.id
    );
    insert into surety.facts select p_fact.*;
end;
$$;

comment on function surety.store_command_fact(surety.facts) is
'Stores a fact about a command of our own, with its key. The payment is locked, the fact new; the caller advances the
payment.';
